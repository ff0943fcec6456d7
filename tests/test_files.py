from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store import files

HOSTILE_NAMES = ["with space", "ünï-ça", "new\nline", "n" * 255, "-rf", "$(x)"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_writes_whole_files_under_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [name]


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": "ünï\udcff"})
    assert list(json.loads(path.read_bytes())) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_bytes())["b"] == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a", "x")
        with files.staged_folder(tmp_path / "folder") as folder:
            (folder / "b").write_text("y")
        files.JsonLines(tmp_path / "c").close()
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    assert (tmp_path / "c").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_symlinked_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link" / "a", "x")
    with files.staged_folder(tmp_path / "link" / "b"):
        pass
    assert names(tmp_path / "real") == ["a", "b"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the order of what reaches the disk."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def target(descriptor: int) -> str:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        return "temp" if name.startswith(".tmp-") else name

    def spy_fsync(descriptor: int) -> None:
        seen.append(f"fsync {target(descriptor)}")
        fsync(descriptor)

    def spy_move(real: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def move(source: Path, goal: Path) -> None:
            seen.append(f"rename {Path(goal).name}")
            real(source, goal)

        return move

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_move(replace))
    monkeypatch.setattr(os, "rename", spy_move(rename))
    return seen


def test_order_of_a_file(tmp_path: Path, calls: list[str]) -> None:
    files.write_text(tmp_path / "a", "x")
    assert calls == ["fsync temp", "rename a", f"fsync {tmp_path.name}"]


def test_order_of_a_folder(tmp_path: Path, calls: list[str]) -> None:
    with files.staged_folder(tmp_path / "step") as folder:
        (folder / "data").write_text("x")
        files.sync(folder / "data")
        files.write_text(folder / "manifest.json", "{}")
    manifest = calls.index("rename manifest.json")
    assert calls.index("fsync data") < manifest
    assert calls[-3:] == ["fsync temp", "rename step", f"fsync {tmp_path.name}"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with files.staged_folder(tmp_path / "step") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("old")
    with pytest.raises(CfamcError, match=r"step: directory not empty"), files.staged_folder(tmp_path / "step"):
        pass
    assert names(tmp_path) == ["step"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize(
    ("call", "nth"), [("open", 1), ("open", 2), ("open", 3), ("write", 1), ("fsync", 1), ("fsync", 2), ("replace", 1)]
)
def test_a_failing_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, nth: int
) -> None:
    path = tmp_path / "a"
    files.write_text(path, "old")
    real, count = getattr(os, call), iter(range(1, 100))

    def failing(*arguments: object, **keywords: object) -> object:
        if next(count) == nth:
            raise OSError(code, "injected")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(CfamcError) as caught:
            files.write_text(path, "new!")
    assert str(path) in caught.value.message or str(tmp_path) in caught.value.message
    assert os.strerror(code).lower() in caught.value.message
    assert "\n" not in caught.value.message
    if code in (errno.ENOSPC, errno.EDQUOT) and call == "write":
        assert "4 bytes needed" in caught.value.message
        assert "bytes free" in caught.value.message
    renamed = (call, nth) in [("open", 3), ("fsync", 2)]  # only the folder's flush comes later
    assert path.read_text() == ("new!" if renamed else "old")
    assert names(tmp_path) == ["a"]


def test_a_file_size_limit_is_named(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from cfamc_cli.store import files
        from cfamc_cli.errors import CfamcError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_bytes(Path(sys.argv[1]), b"x" * 2000)
        except CfamcError as error:
            print(error.message)
    """
    path = tmp_path / "a"
    path.write_bytes(b"old")
    done = run(code, path)
    assert done.stdout == f"cannot use {path}: file too large\n"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = files.JsonLines(tmp_path / "a")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, lines._descriptor)
    os.close(descriptor)
    with pytest.raises(CfamcError, match=r"no space left on device \(8 bytes needed, [\d,]+ bytes free\)"):
        lines.append({"a": 1})
    found = list(os.statvfs(tmp_path))
    found[1], found[4], found[7] = 4096, 2, 0  # frsize, bavail, favail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(found))
    with pytest.raises(CfamcError, match=r"device \(8 bytes needed, 8,192 bytes free, but no inode\)"):
        lines.append({"a": 1})
    lines.close()


def test_reading_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for path, cause in [
        (tmp_path, "is a directory|not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop", "too many levels of symbolic links"),
        (tmp_path / "large", "larger than 10 bytes"),
        (tmp_path / "missing", "no such file"),
        (tmp_path / ("n" * 300), "file name too long"),
    ]:
        with pytest.raises(CfamcError, match=cause):
            files.read_bytes(path, limit=10)


def position(data: bytes) -> files.Position:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_json_lines_round_trip_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with files.JsonLines(path) as lines:
        lines.append({"step": 1})
        first = lines.position()
        lines.append({"step": 2, "name": "a\nb"})
        with pytest.raises(ValueError, match="not JSON compliant"):
            lines.append({"loss": float("inf")})
        assert lines.position() == position(path.read_bytes())
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2, "name": "a\nb"}]
    files.cut(path, first)
    assert files.read_jsonl(path) == [{"step": 1}]
    with files.JsonLines(path) as lines:
        assert lines.position() == first
    for changed in (b'{"step":7}\n', b'{"step":7}\n{"step":2}\n'):
        path.write_bytes(changed)
        with pytest.raises(CfamcError, match="its first 11 bytes are not those of the checkpoint") as caught:
            files.cut(path, first)
        assert caught.value.exit_code == ExitCode.BAD_DATA
        assert path.read_bytes() == changed
        files.cut(path, {"size": 11, "sha256": None})  # of a checkpoint that does not know them
    with pytest.raises(CfamcError, match="has 11 bytes where a checkpoint counts on 12") as caught:
        files.cut(path, {"size": 12, "sha256": None})
    assert caught.value.exit_code == ExitCode.BAD_DATA
    files.cut(tmp_path / "missing", position(b""))
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("whole", [b"", b'{"a":1}\n', b'{"a":1}\n{"b":"' + b"x" * 200_000 + b'"}\n'])
@pytest.mark.parametrize("tail", [b"", b'{"c', b'{"c":1}', b"\0\0\0", b"y" * 100_000])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, whole: bytes, tail: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole + tail)
    assert len(files.read_jsonl(path)) == whole.count(b"\n")
    with files.JsonLines(path) as lines:
        assert lines.position() == position(whole)
        lines.append({"d": 1})
    assert path.read_bytes() == whole + b'{"d":1}\n'


@pytest.mark.parametrize("line", [b"{", b"", b"12", b"[1]", b'{"a":NaN}', b'{"a":-Infinity}', b"\xff", b"[" * 100_000])
def test_a_broken_middle_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(CfamcError, match=r"a\.jsonl:2: not a JSON object"):
        files.read_jsonl(path)


def test_an_append_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    real, count = os.write, iter(range(100))

    def half(descriptor: int, data: memoryview) -> int:
        if next(count) == 1:
            raise OSError(errno.ENOSPC, "injected")
        return real(descriptor, data[:4])

    with files.JsonLines(path) as lines:
        lines.append({"a": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(CfamcError, match="no space left"):
                lines.append({"b": 2})
        lines.append({"c": 3})
    assert files.read_jsonl(path) == [{"a": 1}, {"c": 3}]


def run(code: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing a folder."""
    code = """
        import sys, time
        from pathlib import Path
        from cfamc_cli.store import files
        with files.staged_folder(Path(sys.argv[1]) / "step") as folder:
            (folder / "a").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_sweep_removes_only_what_the_dead_left(tmp_path: Path, victim: subprocess.Popen[str]) -> None:
    (tmp_path / ".tmp-notes").write_text("not ours")
    (tmp_path / ".tmp-00000000-1-1-00000000").write_text("of another machine")
    kept = [".tmp-00000000-1-1-00000000", ".tmp-notes"]
    assert files.sweep(tmp_path) == []
    victim.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    removed = files.sweep(tmp_path)
    assert len(removed) == 1
    assert names(tmp_path) == kept
    assert files.sweep(tmp_path / "missing") == []


def test_a_number_given_again_is_another_process(tmp_path: Path) -> None:
    own = files._temp_name()
    *_, host, pid, start, _ = own.split("-")
    assert (int(pid), int(start)) == (os.getpid(), files.process_start(os.getpid()))
    assert files.process_start(2**22 + 1) is None
    again = f".tmp-{host}-{pid}-{int(start) + 1}-00000000"
    gone = f".tmp-{host}-{2**22 + 1}-{start}-00000000"
    for name in (own, again, gone, ".tmp-00000000-1-1-00000000"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in files.sweep(tmp_path)) == sorted([again, gone])


@pytest.mark.slow
def test_kill_at_random_moments_never_shows_a_torn_file(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from cfamc_cli.store import files
        folder, step = Path(sys.argv[1]), 0
        lines = files.JsonLines(folder / "a.jsonl")
        print("ready", flush=True)
        while True:
            step += 1
            files.write_json(folder / "a.json", {"step": step, "pad": "x" * 10_000})
            lines.append({"step": step})
    """
    for delay in range(20):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.002 * delay)
        process.kill()
        process.wait()
        process.stdout.close()
        if (tmp_path / "a.json").exists():
            assert len(json.loads((tmp_path / "a.json").read_bytes())["pad"]) == 10_000
        files.read_jsonl(tmp_path / "a.jsonl")
        files.sweep(tmp_path)
        assert set(names(tmp_path)) <= {"a.json", "a.jsonl"}
