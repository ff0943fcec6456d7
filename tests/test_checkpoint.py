"""Checkpoints that were cut, flipped, faked, forged or could not be written; and the order in which they are."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_inputs import fill
from torch import Tensor

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.checkpoint import MANIFEST, MODEL, STATE, Checkpoint
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe.schema import Model

FILES = (MODEL, STATE, MANIFEST)


def small(factor: float = 1.0) -> Checkpoint:
    model = {"weight": torch.arange(12.0).view(3, 4) * factor, "count": torch.tensor(3), "bias": torch.ones(3)}
    state = {"momentum.0000": torch.full((3, 4), 0.5), "journal": torch.zeros(0, 5)}
    return Checkpoint(model, state, {"step": 15, "recipe": "f" * 64, "positions": {"metrics.jsonl": 1234}})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 15, small())


def refused(work: Callable[[], object], name: str) -> CfamcError:
    started = time.process_time()
    with pytest.raises(CfamcError) as caught:
        work()
    assert time.process_time() - started < 5
    error = caught.value
    assert error.exit_code == ExitCode.BAD_DATA
    assert name in error.message
    assert "\n" not in error.message + error.hint
    return error


def sign(folder: Path) -> None:
    """Make the manifest agree with the files, so that what is in them is looked at."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    for name in (MODEL, STATE):
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": checkpoint.sha256(data)}
    digest = checkpoint.sha256(json.dumps(manifest, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}) + "\n")


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with any header."""
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# What is whole


def test_what_is_saved_is_loaded(saved: Path) -> None:
    found, wanted = checkpoint.load(saved), small()
    assert found.progress == wanted.progress
    for ours, theirs in ((found.model, wanted.model), (found.state, wanted.state)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value)
            assert ours[name].dtype == value.dtype
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000015"]


def test_equal_tensors_give_equal_bytes_in_any_order_and_layout() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    first = checkpoint.encode({"a": x, "b": x + 1})
    second = checkpoint.encode({"b": x + 1, "a": x.contiguous(memory_format=torch.channels_last)})
    assert first == second


@pytest.mark.parametrize("low", [b"\x80", b"PK"])
def test_a_header_whose_length_looks_like_a_pickle_is_read(low: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(low, "little")
    text = json.dumps({"a": entry("F32", [1], 0, 4)}).encode()
    data = struct.pack("<Q", length) + text.ljust(length) + struct.pack("<f", 2.5)
    assert checkpoint.decode(tmp_path / "x", data)["a"].tolist() == [2.5]


def test_a_checkpoint_that_is_there_is_kept_and_a_damaged_one_replaced(saved: Path) -> None:
    before = (saved / MODEL).read_bytes()
    checkpoint.save(saved.parent, 15, small(2.0))
    assert (saved / MODEL).read_bytes() == before
    (saved / MODEL).write_bytes(b"")
    checkpoint.save(saved.parent, 15, small(2.0))
    assert float(checkpoint.load(saved).model["weight"][2, 3]) == 22


# What is damaged


@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_refused(name: str, saved: Path) -> None:
    whole = (saved / name).read_bytes()
    head = int.from_bytes(whole[:8], "little") + 8 if name != MANIFEST else 20
    for size in (0, 1, 7, 8, 9, head - 1, head, head + 1, len(whole) // 2, len(whole) - 1):
        if size < len(whole):
            (saved / name).write_bytes(whole[:size])
            refused(lambda: checkpoint.load(saved), name)
            if name == MODEL:
                refused(lambda: checkpoint.read_tensors(saved / MODEL), name)
    (saved / name).write_bytes(whole + b"\0")
    refused(lambda: checkpoint.load(saved), name)


def test_a_thousand_flipped_bits_are_noticed(saved: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    contents = {name: (saved / name).read_bytes() for name in FILES}
    for name, data in contents.items():
        path = saved / name
        for bit in torch.randint(8 * len(data), (334,), generator=generator).tolist():
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(CfamcError) as caught:
                checkpoint.load(saved)
            assert caught.value.exit_code == ExitCode.BAD_DATA
        path.write_bytes(data)
    checkpoint.load(saved)


FAKES: dict[str, bytes] = {
    "empty": b"",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "pickle": pickle.dumps({"weight": [1.0] * 100}),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "zeros": b"\0" * 100,
    "header of 100,000,001 bytes": struct.pack("<Q", 100_000_001) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header that is no JSON": struct.pack("<Q", 8) + b"not json",
    "header that is a list": struct.pack("<Q", 8) + b"[]      ",
    "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "overlapping offsets": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "negative offsets": header({"a": entry("F32", [2], -8, 0)}, b"\0" * 8),
    "offsets beyond the end": header({"a": entry("F32", [2], 0, 8)}, b"\0" * 4),
    "a hole": header({"a": entry("F32", [1], 4, 8)}, b"\0" * 8),
    "shape that does not fit": header({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
    "shape that overflows": header({"a": entry("F32", [2**62, 2**62], 0, 8)}, b"\0" * 8),
    "unknown dtype": header({"a": entry("Q32", [2], 0, 8)}, b"\0" * 8),
}


@pytest.mark.parametrize("name", FAKES)
def test_what_is_no_safetensors_file_is_refused(name: str, saved: Path) -> None:
    (saved / MODEL).write_bytes(FAKES[name])
    refused(lambda: checkpoint.load(saved), MODEL)
    error = refused(lambda: checkpoint.read_tensors(saved / MODEL), MODEL)
    expected = {"lfs": "Git LFS", "pickle": "pickle", "zip": "pickle"}.get(name, "")
    assert expected in error.message
    sign(saved)
    refused(lambda: checkpoint.load(saved), MODEL)


def test_a_huge_file_with_a_huge_header_is_refused_quickly(saved: Path) -> None:
    with (saved / MODEL).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(110_000_000)  # sparse
    refused(lambda: checkpoint.read_tensors(saved / MODEL), MODEL)


MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "no schema": b"{}",
    "another schema": b'{"schema": 2}',
    "infinite size": json.dumps({"schema": 1, "progress": {}}).encode()[:-1]
    + b', "files": {"model.safetensors": {"size": 1e999, "sha256": ""}}}',
    "no files": b'{"schema": 1, "files": {}, "progress": {}}',
    "files as text": b'{"schema": 1, "files": "model.safetensors", "progress": {}}',
    "progress as text": b'{"schema": 1, "files": {}, "progress": "15"}',
    "not UTF-8": b'{"schema": "\xff"}',
    "nested": b'{"schema": ' + b"[" * 100_000,
    "many digits": b'{"schema": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_no_manifest_is_refused(name: str, saved: Path) -> None:
    (saved / MANIFEST).write_bytes(MANIFESTS[name] + b"\n")
    refused(lambda: checkpoint.load(saved), MANIFEST)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "dangling link"])
def test_what_is_no_file_is_refused_and_never_waited_for(name: str, kind: str, saved: Path) -> None:
    path = saved / name
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")
    refused(lambda: checkpoint.load(saved), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, saved: Path) -> None:
    tensors = {**small().model, "bias": torch.full((3,), value)}
    (saved / MODEL).write_bytes(checkpoint.encode(tensors))
    sign(saved)
    assert "bias is not finite" in refused(lambda: checkpoint.load(saved), MODEL).message


# Another architecture

TINY = Model(width=2, hidden_dim=4, embedding_dim=4)


def weights() -> dict[str, Tensor]:
    net = Encoder(TINY)
    fill(net.state_dict())
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return weights() | {name: value}


WRONG: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "missing key": (
        lambda: {k: v for k, v in weights().items() if k != "pre_feature.0.bias"},
        "lacks pre_feature.0.bias",
    ),
    "extra key": (lambda: changed("fc.weight", torch.ones(2)), "has fc.weight"),
    "dtype": (lambda: changed("pre_feature.0.bias", torch.zeros(4, dtype=torch.float64)), "float64"),
    "half": (lambda: changed("pre_feature.0.bias", torch.zeros(4, dtype=torch.float16)), "float16"),
    "shape": (lambda: changed("pre_feature.0.bias", torch.zeros(5)), "(5,)"),
    "shape that would broadcast": (lambda: changed("pre_feature.0.bias", torch.zeros(1)), "(1,)"),
    "NaN": (lambda: changed("pre_feature.0.bias", torch.full((4,), torch.nan)), "not finite"),
    "all NaN": (lambda: {k: v * torch.nan if v.is_floating_point() else v for k, v in weights().items()}, "not finite"),
    "another width": (lambda: dict(Encoder(Model(width=4, hidden_dim=4, embedding_dim=4)).state_dict()), "is expected"),
    "another depth": (
        lambda: dict(Encoder(Model(backbone="resnet34", width=2, hidden_dim=4, embedding_dim=4)).state_dict()),
        "another architecture",
    ),
    "nothing": (dict, "another architecture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_change_nothing(name: str, tmp_path: Path) -> None:
    make, cause = WRONG[name]
    net = Encoder(TINY)
    net.load_state_dict(weights())
    tensors, before = make(), weights()
    error = refused(lambda: checkpoint.load_state(net, tensors, path=tmp_path / "m.safetensors"), "m.safetensors")
    assert cause in error.message
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_tensors_that_fit_are_taken_over(tmp_path: Path) -> None:
    net = Encoder(TINY)
    expected = weights()
    checkpoint.load_state(net, expected, path=tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    other = Encoder(TINY)
    other.load_state_dict(expected)
    assert checkpoint.digest_of(net) == checkpoint.digest_of(other)
    assert checkpoint.count_parameters(net) == sum(parameter.numel() for parameter in net.parameters())


# Falling back and pruning


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "empty folder", "not finite", "a file"])
def test_the_newest_valid_checkpoint_is_found_and_the_damage_told(damage: str, saved: Path) -> None:
    newer = checkpoint.save(saved.parent, 20, small(2.0))
    match damage:
        case "cut":
            (newer / STATE).write_bytes((newer / STATE).read_bytes()[:-1])
        case "flip":
            data = bytearray((newer / MODEL).read_bytes())
            data[-1] ^= 1
            (newer / MODEL).write_bytes(data)
        case "no manifest":
            (newer / MANIFEST).unlink()
        case "empty folder":
            for path in newer.iterdir():
                path.unlink()
        case "not finite":
            (newer / MODEL).write_bytes(checkpoint.encode({"weight": torch.full((2,), torch.nan)}))
            sign(newer)
        case "a file":
            shutil.rmtree(newer)
            newer.write_text("x")
    path, found, problems = checkpoint.newest_valid(saved.parent)
    assert path == saved
    assert float(found.model["weight"][2, 3]) == 11
    assert len(problems) == 1
    assert newer.name in problems[0].message
    assert problems[0].exit_code == ExitCode.BAD_DATA


def test_no_valid_checkpoint_is_an_error(saved: Path, tmp_path: Path) -> None:
    refused(lambda: checkpoint.newest_valid(tmp_path / "nowhere"), "nowhere")
    (saved / MANIFEST).unlink()
    refused(lambda: checkpoint.newest_valid(saved.parent), MANIFEST)


def test_other_names_are_not_checkpoints(saved: Path) -> None:
    for name in ("step-1", "step-00000016.tmp", ".tmp-x", "step-000000aa"):
        (saved.parent / name).mkdir()
    checkpoint.save(saved.parent, 123_456_789, small())
    assert [path.name for path in checkpoint.list_checkpoints(saved.parent)] == ["step-123456789", "step-00000015"]


def test_pruning_keeps_the_newest(saved: Path) -> None:
    for step in (20, 25):
        newest = checkpoint.save(saved.parent, step, small())
    checkpoint.prune(saved.parent, newest=newest, keep=2)
    assert [path.name[-2:] for path in checkpoint.list_checkpoints(saved.parent)] == ["25", "20"]


def test_pruning_never_prefers_a_damaged_checkpoint_that_the_run_went_back_from(saved: Path) -> None:
    damaged = checkpoint.save(saved.parent, 20, small())
    (damaged / MODEL).write_bytes(b"")
    newest = checkpoint.save(saved.parent, 18, small())  # after going back to 15
    checkpoint.prune(saved.parent, newest=newest, keep=1)
    assert checkpoint.list_checkpoints(saved.parent) == [newest]


# What cannot be written


def failing(monkeypatch: pytest.MonkeyPatch, call: str, *, at: int, code: int) -> list[int]:
    """Make the `at`-th of the system's calls of one kind fail; the list counts them."""
    real, calls = getattr(os, call), [0]

    def fail(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    monkeypatch.setattr(os, call, fail)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "rename", "mkdir"])
def test_a_failure_of_any_write_leaves_the_older_checkpoint(
    call: str, code: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 40):
        with monkeypatch.context() as patch:
            calls = failing(patch, call, at=at, code=code)
            try:
                checkpoint.save(saved.parent, 20, small(2.0))
            except CfamcError as caught:
                error: CfamcError | None = caught
            else:
                error = None
        if calls[0] < at:
            assert error is None
            assert at > 1, f"{call} is used"
            break
        path, _, problems = checkpoint.newest_valid(saved.parent)
        assert not problems, "never half a checkpoint"
        if call == "mkdir" and at == 1:  # of the folder of checkpoints, which is there
            assert error is None
            shutil.rmtree(path)
            continue
        assert checkpoint.load(saved).progress["step"] == 15
        assert error is not None
        assert error.exit_code == ExitCode.FAILED
        if code == errno.ENOSPC:
            assert "bytes needed" in error.message or call == "fsync"
            assert "free some space" in error.hint
        if path != saved:  # all was written, only the folder's own flush failed
            shutil.rmtree(path)
        assert [part.name for part in saved.parent.iterdir()] == [saved.name], "nothing is left behind"
    else:
        pytest.fail("no end of calls")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CfamcError, match="file"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, small())


def test_data_then_manifest_then_rename_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def plain(path: Path | str) -> str:
        """The last part of a path, without what is random about temporary names."""
        name = Path(path).name
        return "temp" if name.startswith(".tmp-") else name

    def record(call: str) -> None:
        real = getattr(os, call)

        def recorded(first: Any, *rest: Any, **named: Any) -> Any:
            target = rest[0] if call in ("replace", "rename") else Path(f"/proc/self/fd/{first}").readlink()
            order.append((call, plain(target)))
            return real(first, *rest, **named)

        monkeypatch.setattr(os, call, recorded)

    for call in ("write", "fsync", "replace", "rename"):
        record(call)
    checkpoint.save(folder, 7, small())
    one_file = [("write", "temp"), ("fsync", "temp")]
    steps = [step for name in FILES for step in (*one_file, ("replace", name), ("fsync", "temp"))]
    assert order[: len(steps)] == steps, "each file is flushed before it is named, the manifest last"
    flushed = order[len(steps) : -2]
    assert {call for call, _ in flushed} == {"fsync"}
    assert [name for _, name in flushed][-1] == "temp"
    assert order[-2:] == [("rename", "step-00000007"), ("fsync", "checkpoints")]
