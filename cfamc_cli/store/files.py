"""Files that exist whole or not at all, and append-only files of JSON lines.

A file is written under a temporary name beside its final one, flushed to the disk and renamed; then the folder is
flushed. A temporary name says which process made it, so that what a killed process left can be told from what a live
one is writing. A line of a JSON-lines file exists once its newline does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2s
from pathlib import Path
from typing import TypedDict

from cfamc_cli.errors import CfamcError, bad_data

MAX_READ = 256 * 2**20  # bytes; no file that is read whole comes near it
_TEMP = re.compile(r"\.tmp-([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}")
_CHANGED = "bring the file back as it was, or start a new run"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def process_start(pid: int) -> int | None:
    """Return when a process of this machine started, 0 where only its existence is known, None where it is gone."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:
            return 0
        except (OSError, OverflowError):
            return None
        return 0
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie holds nothing any more


@contextmanager
def explained(path: Path | str, *, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into one line that names the file and the cause.

    Args:
        path: The file or folder that the block is about.
        needed: Bytes that the block wants to write, told when there is no space.

    Raises:
        CfamcError: In place of any OSError.
    """
    try:
        yield
    except OSError as error:
        cause = (os.strerror(error.errno) if error.errno else str(error)).lower()
        hint = ""
        if error.errno in _NO_SPACE:
            cause += f" ({_space(path, needed)})"
            hint = "free some space, or choose another folder"
        raise CfamcError(f"cannot use {path}: {cause}", hint=hint) from error


def read_bytes(path: Path | str, *, limit: int = MAX_READ) -> bytes:
    """Read a regular file; a device, a pipe and a file over `limit` bytes are refused and never waited for.

    Raises:
        CfamcError: The file cannot be read, is not a regular file or is too large.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise bad_data(f"cannot use {path}: not a regular file")
            if status.st_size > limit:
                raise bad_data(f"cannot use {path}: larger than {limit:,} bytes")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)  # what a writer adds meanwhile is for the next reader
        finally:
            os.close(descriptor)


@contextmanager
def staged_file(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Fill a file, or a new folder, that appears under its name only when it is complete.

    Args:
        path: The name that it gets; a file that has it now is replaced.
        needed: Bytes that will be written, told when there is no space.

    Yields:
        The temporary name to write to.

    Raises:
        CfamcError: The disk is full, the folder cannot be written, or the device failed; what was written is removed.
    """
    temp = path.parent / _temp_name()
    with explained(path, needed=needed):
        try:
            yield temp
            for folder, folders, names in os.walk(temp, topdown=False):  # nothing where it is a file
                for name in (*names, *folders):
                    sync(Path(folder, name))
            sync(temp)
            (temp.rename if temp.is_dir() else temp.replace)(path)  # a folder takes nothing's place
        except BaseException:
            _remove(temp)
            raise
        sync(path.parent)


@contextmanager
def staged_folder(final: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Fill a folder, which must not exist yet and whose parent must; else as `staged_file`."""
    with staged_file(final, needed=needed) as temp:
        temp.mkdir()
        yield temp


def write_bytes(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was.

    Raises:
        CfamcError: As for `staged_file`.
    """
    with staged_file(path, needed=len(data)) as temp:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask has its say
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Make `path` hold `text` as UTF-8; else as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Make `path` hold `value` as JSON, keys in the order given, or leave it as it was.

    Raises:
        ValueError: A number is not finite.
        CfamcError: As for `staged_file`.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def discard(folder: Path) -> None:
    """Remove a folder: from one moment to the next it is gone under its name, whatever ends the work after that.

    Raises:
        CfamcError: It cannot be removed; names what is left.
    """
    temp = folder.parent / _temp_name()
    with explained(folder):
        folder.rename(temp)
    with explained(temp):
        shutil.rmtree(temp)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, as far as it can be read; links count as such."""
    places = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    total = 0
    for path in places:
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def sync(path: Path) -> None:
    """Flush a file or folder to the disk.

    Raises:
        CfamcError: The device failed or the path is gone.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files and folders that dead processes of this machine left in `folder`.

    Returns:
        What was removed.
    """
    host = _host_digest()
    removed = []
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            found = _TEMP.fullmatch(path.name)
            if found and found[1] == host and process_start(int(found[2])) != int(found[3]):
                _remove(path)
                removed.append(path)
    return removed


class Position(TypedDict):
    """Where a file ends: its bytes, and the SHA-256 of them."""

    size: int
    sha256: str | None  # unknown to the checkpoints of older runs


class JsonLines:
    """An append-only file of JSON objects, one a line, with one writer at a time.

    A record is handed to the system as it is appended, so it outlives the process; `position` makes it outlive a power
    cut. A torn last line that a killed writer left is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            self._size = _whole_lines(self._descriptor)
            os.ftruncate(self._descriptor, self._size)
            self._sha256 = _sha256(self._descriptor)

    def append(self, record: Mapping[str, object]) -> None:
        """Add one record; when that fails, the file is as it was.

        Raises:
            ValueError: A number is not finite.
            CfamcError: As for `staged_file`.
        """
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        with explained(self.path, needed=len(line)):
            try:
                _write_all(self._descriptor, line)
            except BaseException:
                with suppress(OSError):  # else the next opening cuts off the torn line
                    os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(line)
        self._sha256.update(line)

    def position(self) -> Position:
        """Flush to the disk and return where the file ends."""
        with explained(self.path):
            os.fsync(self._descriptor)
        return {"size": self._size, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut(path: Path, at: Position) -> None:
    """Cut a file back to where it ended once; a missing file has 0 bytes.

    Raises:
        CfamcError: The file is shorter than that, was changed before it, or cannot be written.
    """
    size = at["size"]
    with explained(path):
        found = path.lstat().st_size if os.path.lexists(path) else 0
        if found < size:
            raise bad_data(f"{path} has {found:,} bytes where a checkpoint counts on {size:,}", _CHANGED)
        if not found:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if at["sha256"] not in (None, _sha256(descriptor, size).hexdigest()):
                raise bad_data(f"{path}: its first {size:,} bytes are not those of the checkpoint", _CHANGED)
            if found > size:
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def links_below(folder: Path) -> Iterator[Path]:
    """Every symbolic link in a folder and the folders in it; none of them is followed."""
    for place, folders, names in os.walk(folder):
        yield from (path for name in (*folders, *names) if (path := Path(place, name)).is_symlink())


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """Read a file of JSON lines that a writer may be appending to; an unfinished last line is left out.

    Raises:
        CfamcError: The file cannot be read, or a finished line is not a JSON object; names file and line.
    """
    records = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise bad_data(f"{path}:{number}: not a JSON object")
        records.append(record)
    return records


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and the infinities are no JSON


def _temp_name() -> str:
    pid = os.getpid()
    return f".tmp-{_host_digest()}-{pid}-{process_start(pid) or 0}-{secrets.token_hex(4)}"


def _host_digest() -> str:
    return blake2s(socket.gethostname().encode(), digest_size=4).hexdigest()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sha256(descriptor: int, size: int | None = None) -> hashlib._Hash:
    """The digest of an open file's first `size` bytes, or of all of them, to be gone on with."""
    return hashlib.sha256(os.pread(descriptor, os.fstat(descriptor).st_size if size is None else size, 0))


def _whole_lines(descriptor: int) -> int:
    """Bytes up to and with the last newline, searched from the end."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _space(path: Path | str, needed: int | None) -> str:
    try:
        found = os.statvfs(Path(path).parent)
        no_inode = ", but no inode" if found.f_files and not found.f_favail else ""  # of which some systems count none
        free = f"{found.f_bavail * found.f_frsize:,} bytes free{no_inode}"
    except OSError:
        free = "free space unknown"
    return free if needed is None else f"{needed:,} bytes needed, {free}"
