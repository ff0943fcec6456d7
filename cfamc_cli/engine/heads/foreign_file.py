"""Files of weights that strangers made, opened in a process of its own that has little time and memory.

What a file is, its content tells and never its name. That process hands the tensors over as safetensors on its standard
output; what is wrong with the file it says as one JSON object. A pickle is read as weights only, never freely.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cfamc_cli.engine import checkpoint
from cfamc_cli.errors import CfamcError, bad_data

_SLACK = 2**28  # bytes that tensors may take beyond twice the file: what is larger was made to be
_MEMORY = 2**30  # bytes for reading, beside four times what tensors may take
_SECONDS, _RATE = 10, 50 * 10**6  # of processor time, and bytes that are read in each further one
_WAIT = 30  # times as long on the clock: torch may come from a slow disk, to a machine that has other work
_DEPTH = 32  # tables within tables
_REFUSED = 3  # the exit code of a file that cannot be used
_ALONE = "save its state dict alone, as safetensors or by torch.save(model.state_dict(), ...)"


def read_foreign_file(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a file, dense and on the CPU, by dotted name; tables within tables are part of the name.

    Args:
        path: A safetensors file, or what torch.save wrote, of any name.

    Raises:
        CfamcError: Exit 4; it is no regular file, cannot be read within the limits, or holds no plain tensors.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except OSError as error:
        raise bad_data(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise bad_data(
                f"{path}: not a regular file", "name a file of weights: safetensors, or what torch.save wrote"
            )
        code, told = _in_a_process(descriptor, str(path), seconds=_seconds(status.st_size))
    finally:
        os.close(descriptor)
    if code == 0:
        return checkpoint.decode(path, told)
    if code == _REFUSED:
        raise bad_data(**json.loads(told))
    cause = "it takes too long to be read" if code in _CUT else "reading it ended in a crash, or took too much memory"
    raise bad_data(f"{path}: {cause}", _ALONE)


_CUT = (None, -getattr(signal, "SIGXCPU", 1))  # by the clock, and by the system


def _seconds(size: int) -> int:
    """Of processor time, for a file of `size` bytes."""
    return _SECONDS + size // _RATE


def _in_a_process(descriptor: int, name: str, *, seconds: int) -> tuple[int | None, bytes]:
    """Exit code, None where time was up, and standard output of this module, run on an open file."""
    package = str(Path(__file__).parents[3])
    known = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    # -P: the folder that the person stands in may hold a stranger's torch.py
    command = [sys.executable, "-P", "-m", "cfamc_cli.engine.heads.foreign_file", name]
    alone = os.environ | {"PYTHONPATH": known, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=descriptor,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=alone,
            timeout=_WAIT * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, b""
    return done.returncode, done.stdout


# In that process


def _main(name: str) -> int:
    """Standard input to standard output; returns the exit code."""
    file = sys.stdin.buffer
    _limit(os.fstat(file.fileno()).st_size)
    code, told = _answer(file, name)
    sys.stdout.buffer.write(told)
    return code


def _answer(file: IO[bytes], name: str) -> tuple[int, bytes]:
    """Exit code and output for an open file: its tensors, or what is wrong with it."""
    path, size = Path(name), os.fstat(file.fileno()).st_size
    try:
        return 0, checkpoint.encode(dict(_plain(path, _content(path, file, size), most=_most(size))))
    except CfamcError as error:
        refusal = {"message": error.message, "hint": error.hint or _ALONE}
    except (MemoryError, RecursionError) as error:
        refusal = {"message": f"{path}: takes too much memory to be read ({type(error).__name__})", "hint": _ALONE}
    except Exception as error:  # whatever a library raises at bytes that were made to harm it
        refusal = {"message": f"{path}: not a readable file of weights ({_line(error)})", "hint": _ALONE}
    return _REFUSED, json.dumps(refusal).encode()


def _most(size: int) -> int:
    """Bytes that the tensors of a file of `size` bytes may take."""
    return 2 * size + _SLACK


def _limit(size: int) -> None:
    """Bound this process, where the system knows how; what is loaded by now does not count."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        seconds = _seconds(size) + int(sum(os.times()[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        memory = pages * resource.getpagesize() + _MEMORY + 4 * _most(size)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _content(path: Path, file: IO[bytes], size: int) -> object:
    """What the file holds; of three formats, as its first bytes tell."""
    head = file.read(9)
    file.seek(0)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return checkpoint.decode(path, file.read())
    if head[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _most(size):
            raise bad_data(f"{path}: {_gib(size)} that unpack to {_gib(unpacked)}", "get the file from its maker again")
        file.seek(0)
    elif head[:1] != b"\x80":
        return checkpoint.decode(path, file.read())  # which says what it is instead
    try:
        # a namespace of settings lies in many checkpoints, and is a table by another name
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about formats of old, which are read all the same
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+) was", str(error)):
            cause = f"holds more than weights ({found[1]}), and would run code to be read"
        else:
            cause = f"not a readable file of weights ({_line(error).rpartition('error: ')[2]})"
        raise bad_data(f"{path}: {cause}", _ALONE) from error


def _plain(path: Path, content: object, *, most: int) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its dotted name, copied, for tensors may share their memory."""
    if not isinstance(content, Mapping):
        raise bad_data(f"{path}: holds a {type(content).__name__}, not tensors by name", _ALONE)
    tables, seen = [("", content, 0)], {id(content)}  # a table may hold itself
    while tables:
        prefix, table, depth = tables.pop()
        for key, value in table.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and id(value) not in seen and depth < _DEPTH:
                seen.add(id(value))
                tables.append((f"{name}.", value, depth + 1))
            elif isinstance(value, Tensor):
                if kind := _unfit(value):
                    raise bad_data(f"{path}: {name[:200]} is {kind}", "save the state dict of a plain float32 network")
                most -= value.numel() * value.element_size()
                if most < 0:
                    cause = f"{name[:200]} is {tuple(value.shape)}: tensors far larger than the file"
                    raise bad_data(f"{path}: {cause}", _ALONE)
                yield name, value.detach().contiguous().clone()


def _unfit(tensor: Tensor) -> str:
    """Why a tensor holds no plain numbers; empty where it does."""
    kinds = {
        "on the meta device: it has a shape and no values": tensor.device.type != "cpu",
        "sparse": tensor.layout != torch.strided,
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(" Check the documentation")[0]
    return text[-120:] or type(error).__name__


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
