"""The run store: a folder with one folder per run, named so that names sort by time and never meet."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cfamc_cli.errors import CfamcError, ExitCode, bad_data, invalid
from cfamc_cli.recipe.schema import Recipe, as_before
from cfamc_cli.store.files import explained, links_below, process_start, read_bytes, sync
from cfamc_cli.store.records import IMPORTED, ProbeRecord, RunRecord, Status, load_record

LATEST = "latest"
RECORD = "record.json"  # what makes a probe or an attack one
HEAD, PENDING, MAP = "head.safetensors", "pending.json", "map.json"  # of a probe
OUTCOMES, EXAMPLES = "outcomes.json", "examples.safetensors"  # of an attack; below, its pictures
BENCHES = "benches"  # in the store, beside the runs; a bench is a folder with a record
SHEET, LOSS, ACCURACY, SURFACE = "examples.png", "loss.png", "accuracy.png", "surface.png"
CURVES = "curves.png"  # of a training
_LOCK = ".lock"
_KINDS = ("attacks", "measures", "probes", "unlabelled")  # folders of items in a run
_SLUG_LENGTH = 48
_ID = re.compile(r"\d{8}-\d{6}-([a-z0-9-]+?)(-s\d+)?-[0-9a-f]{6}")  # the first runs told no seed
TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,47}")
_LISTED = 8  # candidates that an error names

_held: set[Path] = set()  # locks of this process: the system would grant them to it a second time


class _Part:
    """A file or folder of a run, as an attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, _: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie; none of them needs to exist yet."""

    path: Path
    recipe_toml = _Part("recipe.toml")
    resolved_json = _Part("resolved.json")
    run_json = _Part("run.json")
    metrics = _Part("metrics.jsonl")
    timing = _Part("timing.jsonl")
    checkpoints = _Part("checkpoints")
    probes = _Part("probes")
    attacks = _Part("attacks")
    measures = _Part("measures")
    samples = _Part("samples.jsonl")  # of a measure
    unlabelled = _Part("unlabelled")
    tags_json = _Part("tags.json")

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def status(self) -> Status | None:
        """How far the run is; None where its record cannot be read."""
        try:
            return self.record().status
        except CfamcError:
            return None

    def record(self) -> RunRecord:
        """What run.json says.

        Raises:
            CfamcError: As for `load_record`.
        """
        return load_record(self.run_json, RunRecord)

    def recipe(self) -> Recipe:
        """The recipe as it was resolved when the run began.

        Raises:
            CfamcError: As for `load_record`.
        """
        return load_record(self.resolved_json, Recipe)

    def tags(self) -> tuple[str, ...]:
        """The words that people call it by; none where they cannot be read."""
        try:
            found = json.loads(read_bytes(self.tags_json))
            return tuple(tag for tag in found if isinstance(tag, str) and TAG.fullmatch(tag))
        except (CfamcError, ValueError, TypeError, RecursionError):
            return ()

    def answers_to(self, reference: str) -> bool:
        """Whether a word means this run: the beginning of its id, or an end of that from a dash on, such as its last
        six digits; its name with or without the seed; or a tag.
        """
        name = _ID.fullmatch(self.id)
        named = name is not None and reference in (name[1], f"{name[1]}{name[2] or ''}")
        return self.id.startswith(reference) or self.id.endswith(f"-{reference}") or named or reference in self.tags()

    def state(self, record: RunRecord) -> str:
        """How far it is, in a word: its status, or "killed" where that says otherwise and nobody works on it."""
        return "killed" if record.status in ("created", "running") and self.is_dead() else record.status

    def is_run(self) -> bool:
        """Whether it is a run beyond doubt, and not any other folder of the place that was named as the store."""
        return _ID.fullmatch(self.id) is not None or self.run_json.is_file()

    def spare_checkpoints(self) -> list[Path]:
        """The checkpoints older than the newest whole one; none where none is whole."""
        numbered = [(int(path.name[5:]), path) for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal()]
        found = [path for _, path in sorted(numbered, reverse=True)]
        return next((found[at:] for at, path in enumerate(found, start=1) if found[at:] and _is_whole(path)), [])

    def is_dead(self) -> bool:
        """Whether nobody works on it any more, as far as this machine knows; asked of a run that says "running"."""
        try:
            holder = json.loads(read_bytes(self.path / _LOCK))
            return bool(holder["host"] == socket.gethostname() and process_start(int(holder["pid"])) is None)
        except (CfamcError, ValueError, TypeError, KeyError):
            return not os.path.lexists(self.path / _LOCK)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, unchecked."""
        return any(self.checkpoints.glob("step-*"))

    def final_encoder_digest(self) -> str | None:
        """SHA-256 of the encoder in the newest checkpoint, as its manifest tells it; None where none can be read."""
        try:
            newest = max(self.checkpoints.glob("step-*/manifest.json"), key=lambda path: int(path.parent.name[5:]))
            return str(json.loads(read_bytes(newest))["files"]["model.safetensors"]["sha256"])
        except (CfamcError, OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint are those that its manifest tells of."""
    try:
        files = json.loads(read_bytes(checkpoint / "manifest.json"))["files"]
        for name, told in files.items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return False
        return bool(files)
    except (CfamcError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def default_store(runs: Path | None) -> Path:
    """Return the store that was asked for: by flag, else by CFAMC_RUNS, else ./runs."""
    return runs or Path(os.environ.get("CFAMC_RUNS") or "runs")


def cache_folder() -> Path:
    """Return the user's cache folder of cfamc, where downloads and packed data sets lie; it need not exist."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("cfamc"))


def slug(name: str) -> str:
    """Turn any text into 1 to 48 characters of a-z, 0-9 and inner dashes."""
    text = unicodedata.normalize("NFKD", name[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:_SLUG_LENGTH].strip("-") or "run"


def create_run(store: Path, name: str, *, seed: int, now: datetime) -> RunFolder:
    """Make the folder of a new run; no two callers ever get the same one.

    Args:
        store: The run store, made where it is missing.
        name: Name of the recipe; any text.
        seed: Of the recipe; the id tells it.
        now: Time of the run, with its time zone.

    Raises:
        CfamcError: The store cannot be written.
    """
    with explained(store):
        store.mkdir(parents=True, exist_ok=True)
    while True:
        path = store / f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{slug(name)}-s{seed}-{secrets.token_hex(3)}"
        with explained(path), suppress(FileExistsError):
            path.mkdir()
            sync(store)
            return RunFolder(path)


def new_item(folder: Path, kind: str) -> Path:
    """Make a folder for one more probe or attack, such as probes/linear-001, and return it.

    Args:
        folder: `RunFolder.probes` or `RunFolder.attacks`, made where it is missing.
        kind: What the item is, any text.

    Raises:
        CfamcError: The run cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        prefix = slug(kind)
        number = sum(entry.name.startswith(prefix) for entry in folder.iterdir())
        while True:
            number += 1
            path = folder / f"{prefix}-{number:03d}"
            with suppress(FileExistsError):
                path.mkdir()
                sync(folder)
                return path


def list_runs(store: Path) -> list[RunFolder]:
    """Return the folders of a store, oldest run first, without opening them; hidden ones and benches are left out.

    Raises:
        CfamcError: The store cannot be read.
    """
    with explained(store), os.scandir(store) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    return [RunFolder(store / name) for name in names if name != BENCHES]


def find_run(store: Path, reference: str, *, accept: Callable[[RunFolder], bool] = lambda _run: True) -> RunFolder:
    """Find the one run that a person means.

    Args:
        store: Where to look.
        reference: A path, "latest", or what a run answers to; a whole id means that run alone.
        accept: Which runs "latest" may mean.

    Raises:
        CfamcError: No run or several match; exit code 2, and the hint lists candidates.
    """
    if reference and (run := _by_path(reference)) is not None:
        return run
    with explained(store):
        runs = list_runs(store) if store.is_dir() else []
    if reference == LATEST:
        newest = (run for run in reversed(runs) if _ID.fullmatch(run.id) and accept(run))
        if (run := next(newest, None)) is not None:
            return run
        found = "no run" if not runs else f"none of the {len(runs)} runs fits"
        raise invalid(f"{found} in {store}", "start one with: cfamc pretrain recipes/quickstart.toml")
    matches = [run for run in runs if run.id == reference]
    matches = matches or [run for run in runs if reference and run.answers_to(reference)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise invalid(f"{reference!r} means {len(matches)} runs in {store}", _listed("one of", matches))
    raise invalid(f"no run {reference!r:.200} in {store}", _listed("newest", runs[::-1]) if runs else "")


def finished_probes(run: RunFolder) -> list[tuple[Path, ProbeRecord]]:
    """The finished probes of a run, oldest first; records that cannot be read are left out."""
    found = []
    for path in run.probes.glob(f"*/{RECORD}"):
        with suppress(CfamcError):
            found.append((path.parent, load_record(path, ProbeRecord)))
    return sorted(found, key=lambda item: (item[1].created, (item[0] / RECORD).stat().st_mtime_ns))


def unfinished_probes(run: RunFolder) -> list[Path]:
    """Folders of heads that were begun and can be gone on with, oldest first."""
    begun = [path for path in run.probes.glob(f"*/{PENDING}") if not (path.parent / RECORD).exists()]
    return [path.parent for path in sorted(begun, key=lambda path: (path.stat().st_mtime_ns, path))]


def find_probe(run: RunFolder, reference: str) -> Path:
    """Find a finished probe by its id, or the newest of a kind of head.

    Raises:
        CfamcError: There is none; exit code 2, and the hint lists what there is. Or its record cannot be read: as for
            `load_record`.
    """
    probes = finished_probes(run)
    for folder, record in reversed(probes):
        if reference in (folder.name, record.head):
            return folder
    for path in run.probes.glob(f"*/{RECORD}"):
        if path.parent.name == reference:
            load_record(path, ProbeRecord)  # says what is wrong with it
    names = ", ".join(folder.name for folder, _ in probes)
    hint = f"it has {names}" if names else f"fit one with: cfamc probe {run.id}"
    raise invalid(f"run {run.id} has no probe {reference!r:.100}", hint)


def standard_probe(run: RunFolder, encoder_digest: str) -> Path | None:
    """The newest linear head that was fitted to this encoder on all of the run's own data, or imported with it."""
    own, data = run.record().data, _identity(run.recipe().data.model_dump(mode="json"))
    whole = own.n if own is not None and own.dataset != "stl10" else None  # of stl10 a part has labels
    for folder, record in reversed(finished_probes(run)):
        same = record.encoder_digest == encoder_digest and _identity(record.data) == data
        if record.head in ("linear", IMPORTED) and same and whole in (None, record.train.n):
            return folder
    return None


def _identity(data: Mapping[str, object]) -> dict[str, object]:
    """A [data] table without the place where the files of a known set lie, and as older records have it."""
    table = as_before({"data": data})["data"]
    return {key: value for key, value in table.items() if key != "root" or data.get("dataset") == "folder"}


@contextmanager
def turn(folder: Path, *, wait: Callable[[str], None]) -> Iterator[None]:
    """Within, no other process looks for an item of a run or begins one, so that equal ones are not made twice.

    Args:
        folder: Such as `RunFolder.attacks`, made where it is missing.
        wait: Told of the process that has to be waited for.

    Raises:
        CfamcError: As for `lock`, but that a live process is waited for.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(RunFolder(folder), wait=wait):
        yield


@contextmanager
def lock(run: RunFolder, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a run, or an item of one, for this process alone; the lock ends with the process, however that ends.

    Args:
        run: The run or item.
        wait: Told who holds it, and then its end is waited for; None refuses.

    Raises:
        CfamcError: A live process holds it (exit code 6), the run cannot be written, or there are symbolic links in it,
            which might lead to files of others (exit code 4).
    """
    kinds = (path for path in (run.path, run.path.parent) if path.name in _KINDS and path.is_symlink())
    if link := next(kinds, None) or next(links_below(run.path), None):
        raise bad_data(f"{link} is a symbolic link; those below a run are not followed", "put what it leads to there")
    path = run.path.resolve() / _LOCK
    if path in _held:
        raise _locked(run, "this process")
    with explained(path):
        descriptor = _open_lock(path, run, wait)
    _held.add(path)
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        with explained(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        _held.discard(path)
        os.close(descriptor)


def _open_lock(path: Path, run: RunFolder, wait: Callable[[str], None] | None = None) -> int:
    """Open and lock the file; a POSIX lock, for forked children do not inherit it and outlive their parent with it."""
    while True:
        with ExitStack() as opened:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            opened.callback(os.close, descriptor)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = _holder(os.pread(descriptor, 4096, 0))
                if wait is None:
                    raise _locked(run, holder) from None
                wait(f"{run.path} is held by {holder}: waiting for its turn")
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # the last holder may have removed the file between the two calls
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    opened.pop_all()
                    return descriptor


def _holder(data: bytes) -> str:
    """Who holds a lock, in words; what a dead process wrote is not of the one that has taken it since."""
    try:
        holder = json.loads(data)
        if holder["host"] == socket.gethostname() and process_start(int(holder["pid"])) is None:
            return "another process"
        return f"process {int(holder['pid'])} on {holder['host']!s:.64} since {holder['since']!s:.32}"
    except (ValueError, TypeError, KeyError):
        return "another process"  # it has not written its name yet


def _locked(run: RunFolder, holder: str) -> CfamcError:
    text, hint = f"run {run.id} is held by {holder}", "wait for it, or end it first"
    return CfamcError(text, hint=hint, exit_code=ExitCode.LOCKED)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a loop of links


def _by_path(reference: str) -> RunFolder | None:
    """The run at a path; a bare name counts only where a run lies there, for it may be an id as well."""
    path = Path(reference)
    try:
        if not path.is_dir():
            return None
        run = RunFolder(path.resolve())
        if run.run_json.exists():
            return run
    except (OSError, ValueError):  # too long a name, a NUL
        return None
    if os.sep in reference:
        raise invalid(f"{path} is no run: it holds no run.json", "")
    return None


def _listed(label: str, runs: list[RunFolder]) -> str:
    more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
    return f"{label}: {', '.join(run.id for run in runs[:_LISTED])}{more}"
