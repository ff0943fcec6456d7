"""Checkpoints: a folder of safetensors files with a manifest of their sizes and SHA-256, complete or not there.

The only file that touches safetensors. Nothing is unpickled, and nothing is believed before its digest was checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from cfamc_cli.errors import CfamcError, bad_data
from cfamc_cli.store.files import MAX_READ, explained, read_bytes, staged_folder, write_bytes, write_json

MODEL, STATE, MANIFEST = "model.safetensors", "state.safetensors", "manifest.json"
SCHEMA = 1
_NAME = re.compile(r"step-(\d{8,})")
_MAX_HEADER = 100_000_000  # bytes, safetensors' own bound


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    model: dict[str, Tensor]  # the encoder's state dict, or that of its moving average
    state: dict[str, Tensor]  # optimizer and adversary, and the trained weights where `model` is an average
    progress: dict[str, object]  # JSON values: step, batch and whatever the loop needs to go on


def save(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `folder`/step-XXXXXXXX, whole or not at all; one that is already there and whole is kept.

    Raises:
        CfamcError: The disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        try:
            load(final)
        except CfamcError:
            shutil.rmtree(final, ignore_errors=True)
        else:
            return final
    contents = {MODEL: encode(checkpoint.model), STATE: encode(checkpoint.state)}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(final, needed=sum(map(len, contents.values()))) as staged:
        for name, data in contents.items():
            write_bytes(staged / name, data)
        files = {name: {"size": len(data), "sha256": sha256(data)} for name, data in contents.items()}
        manifest: dict[str, object] = {"schema": SCHEMA, "files": files, "progress": checkpoint.progress}
        write_json(staged / MANIFEST, manifest | {"sha256": _own_digest(manifest)})
    return final


def load(folder: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        CfamcError: Exit 4; names the file and what is wrong with it.
    """
    path = folder / MANIFEST
    try:
        text = _read(path, limit=MAX_READ)
        if not text.endswith(b"\n"):
            raise _bad(path, "cut short")
        manifest = json.loads(text)
        if manifest["schema"] != SCHEMA:
            raise _bad(path, f"schema {manifest['schema']!r}, where {SCHEMA} is known")
        digest = manifest.pop("sha256", None)  # the first runs had none
        if manifest.keys() != {"schema", "files", "progress"} or digest not in (None, _own_digest(manifest)):
            raise _bad(path, "its SHA-256 is not its own")
        files = {
            name: (int(manifest["files"][name]["size"]), manifest["files"][name]["sha256"]) for name in (MODEL, STATE)
        }
        progress = dict(manifest["progress"])
    except (ArithmeticError, AttributeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad(path, "not a manifest") from error
    tensors = {}
    for name, (size, digest) in files.items():
        data = _read(folder / name)
        if len(data) != size:
            raise _bad(folder / name, f"{len(data):,} bytes where the manifest says {size:,}")
        if sha256(data) != digest:
            raise _bad(folder / name, "its SHA-256 is not the manifest's")
        tensors[name] = decode(folder / name, data)
    for name, tensor in tensors[MODEL].items():
        if not torch.isfinite(tensor).all():
            raise _bad(folder / MODEL, f"{name} is not finite")
    return Checkpoint(tensors[MODEL], tensors[STATE], progress)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, unchecked."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(folder: Path) -> tuple[Path, Checkpoint, list[CfamcError]]:
    """The newest checkpoint that is whole, and what was wrong with those after it.

    Raises:
        CfamcError: Exit 4; there is none.
    """
    problems: list[CfamcError] = []
    for path in list_checkpoints(folder):
        try:
            return path, load(path), problems
        except CfamcError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    raise bad_data(f"{folder} holds no checkpoint")


def prune(folder: Path, *, newest: Path, keep: int) -> None:
    """Remove all but `newest` and the `keep` - 1 before it; what lies beyond it was unfit to go on from."""
    paths = list_checkpoints(folder)
    kept = paths[paths.index(newest) :][:keep]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file, on the CPU.

    Raises:
        CfamcError: Exit 4; it is something else, or damaged.
    """
    return decode(path, _read(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file, whole or not at all, and return its SHA-256."""
    data = encode(tensors)
    write_bytes(path, data)
    return sha256(data)


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; equal tensors give equal bytes."""
    return save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def decode(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of `path`.

    Raises:
        CfamcError: Exit 4.
    """
    if len(data) < 8:
        raise _bad(path, f"{len(data)} bytes are no safetensors file")
    if int.from_bytes(data[:8], "little") > min(_MAX_HEADER, len(data) - 8):
        if data.startswith(b"version https://git-lfs"):
            raise _bad(path, "a Git LFS pointer, not the file itself", hint="fetch it with: git lfs pull")
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise _bad(path, "a pickle, not safetensors", hint="import foreign weights with: cfamc probe --import FILE")
        raise _bad(path, "not a safetensors file, or cut short")
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _bad(path, f"not a valid safetensors file ({' '.join(str(error).split())[:120]})") from error


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, hint: str = "") -> None:
    """Put tensors into a module after checking names, shapes, dtypes and that they are finite.

    Raises:
        CfamcError: Exit 4; names the first few keys that do not fit.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"{label} {', '.join(keys[:3])}" for label, keys in (("lacks", missing), ("has", extra)) if keys]
        raise _bad(path, f"another architecture: {' and '.join(parts)}", hint=hint)
    for name, wanted in expected.items():  # in the network's order: a file's own is not stable
        tensor = tensors[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            found, fits = (f"{each.dtype} {tuple(each.shape)}" for each in (tensor, wanted))
            raise _bad(path, f"{name} is {found} where {fits} is expected", hint=hint)
        if not torch.isfinite(tensor).all():
            raise _bad(path, f"{name} is not finite", hint=hint)
    module.load_state_dict(dict(tensors))


def digest_of(module: nn.Module) -> str:
    """SHA-256 over the parameters and buffers of a module, in hex."""
    return sha256(encode(module.state_dict()))


def count_parameters(module: nn.Module) -> int:
    """Trained numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def sha256(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def _own_digest(manifest: Mapping[str, object]) -> str:
    """SHA-256 of what a manifest says, so that a flipped bit of its step or positions is noticed too."""
    return sha256(json.dumps(manifest, sort_keys=True).encode())


def _read(path: Path, *, limit: int | None = None) -> bytes:
    try:
        return read_bytes(path, limit=path.stat().st_size if limit is None else limit)
    except OSError as error:
        raise _bad(path, (error.strerror or str(error)).lower()) from error
    except CfamcError as error:
        raise bad_data(error.message, error.hint) from error


def _bad(path: Path, cause: str, *, hint: str = "") -> CfamcError:
    return bad_data(f"{path}: {cause}", hint)
