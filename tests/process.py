"""Processes of cfamc for tests: whole ones, and cheap ones forked from a parent that imported everything once.

A forked child is a process of its own: a signal, SIGKILL included, ends it as it would end any other. Run as a program,
this file is that parent: it reads a JSON request a line, forks, and answers with a line.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


@dataclass(frozen=True)
class Done:
    """How a process ended; `code` is negative for a signal, as in subprocess."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        """What --json printed."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this one without what would change a test."""
    dropped = ("CFAMC_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM", "_CFAMC", "RANK", "WORLD_SIZE", "PYTEST")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return kept | QUIET | extra


def cfamc(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    seconds: float = 120,
    stdin: int = subprocess.DEVNULL,
    prefix: Sequence[str] = (),
) -> Done:
    """Run a whole process of cfamc to its end."""
    command = [*prefix, sys.executable, "-m", "cfamc_cli", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@cache
def warm() -> Warm:
    """The parent that all tests of a session share."""
    parent = Warm()
    atexit.register(parent.close)
    return parent


class Warm:
    """The parent of cheap children."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._ask({"do": "hello"}) == {"ready": True}

    def start(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        hook: str = "",
        values: Sequence[object] = (),
        closed: Sequence[int] = (),
        terminal: str = "",
    ) -> Child:
        """Fork a child that runs a command line.

        Args:
            arguments: The command line, without the program's name.
            cwd: Its working folder.
            env: Set on top of the tests' environment.
            hook: Name of a function in `HOOKS`, called in the child first.
            values: What the hook is called with.
            closed: Standard streams that the child has not got.
            terminal: Device that is its stderr, in place of a file.
        """
        number = len(list(cwd.glob(".out-*")))
        out, err = cwd / f".out-{number}", cwd / f".err-{number}"
        out.touch()
        err.touch()
        request = {
            "do": "start",
            "arguments": arguments,
            "cwd": str(cwd),
            "env": environment(**(env or {})),
            "out": str(out),
            "err": terminal or str(err),
            "closed": list(closed),
            "hook": hook,
            "values": list(values),
        }
        return Child(self, int(self._ask(request)["pid"]), out, err)

    def run(self, *arguments: str, cwd: Path, seconds: float = 120, **settings: Any) -> Done:
        """Fork a child and wait for its end."""
        return self.start(*arguments, cwd=cwd, **settings).wait(seconds)

    def ended(self, pid: int) -> int | None:
        """The exit code of a child, once it ended."""
        code: int | None = self._ask({"do": "poll", "pid": pid})["code"]
        return code

    def close(self) -> None:
        """End the parent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, dict)
        return answer


@dataclass
class Child:
    """A forked process of cfamc."""

    parent: Warm
    pid: int
    out: Path
    err: Path
    code: int | None = field(default=None)

    def poll(self) -> int | None:
        """The exit code, once it ended."""
        if self.code is None:
            self.code = self.parent.ended(self.pid)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal; one that ended already is past hearing it."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Done:
        """Wait for the end."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"not done after {seconds} s: {self.err.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
        assert self.code is not None
        return Done(self.code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds while the child lives."""
        limit = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self.wait()
            assert time.monotonic() < limit, self.err.read_text(errors="replace")
            time.sleep(0.002)


# What happens inside a child before cfamc starts


def _signals() -> Any:
    """What the command at work has heard, by its handler."""
    return getattr(signal.getsignal(signal.SIGINT), "__self__", None)


def _stand_still(flag: Path, seconds: float) -> None:
    """Tell by a file that the child is at a point, and stay there for some time, at least until a signal came."""
    signals, began = _signals(), time.monotonic()
    flag.touch()
    while (waited := time.monotonic() - began) < seconds or (waited < 60 and not getattr(signals, "received", 1)):
        time.sleep(0.01)


def kill_in_save(point: str, nth: int) -> None:
    """End the process by SIGKILL at a point of its n-th checkpoint."""
    import cfamc_cli.store.files
    from cfamc_cli.engine import checkpoint

    state = {"saves": 0}
    save, write, rename, fsync = checkpoint.save, cfamc_cli.store.files._write_all, Path.rename, os.fsync

    def die(at: str, where: str, part: str = "checkpoints") -> None:
        if at == point and part in where and state["saves"] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_save(*arguments: Any) -> Path:
        state["saves"] += 1
        done = save(*arguments)
        die("after save", str(done))
        return done

    def counted_write(descriptor: int, data: bytes) -> None:
        where, half = _path_of(descriptor), len(data) // 2
        write(descriptor, data[:half])
        die("half the data", where)
        write(descriptor, data[half:])
        die("after data", where)

    def counted_fsync(descriptor: int) -> None:
        where = _path_of(descriptor)
        die("before fsync", where)
        fsync(descriptor)
        die("after fsync", where)
        die("after the folder's fsync", where[-len("checkpoints") :])

    def counted_rename(self: Path, target: Path) -> Path:
        die("before rename", str(target), "step-")
        moved = rename(self, target)
        die("after rename", str(target), "step-")
        return moved

    mock.patch.object(checkpoint, "save", counted_save).start()
    mock.patch.object(cfamc_cli.store.files, "_write_all", counted_write).start()
    mock.patch.object(os, "fsync", counted_fsync).start()
    mock.patch.object(Path, "rename", counted_rename).start()


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def wait_in_save(flag: str) -> None:
    """Stand still inside the first checkpoint, long enough for a signal to arrive."""
    rename = Path.rename

    def slow_rename(self: Path, target: Path) -> Path:
        if "step-" in str(target) and not Path(flag).exists():
            _stand_still(Path(flag), 2)
        return rename(self, target)

    mock.patch.object(Path, "rename", slow_rename).start()


def wait_in_loss(flag: str, at: int, seconds: float) -> None:
    """Stand still inside a weight update."""
    from cfamc_cli.engine.pretrain import Trainer

    loss_of = Trainer.loss_of

    def slow(self: Trainer, *arguments: Any) -> Any:
        if self.step == at and _signals()._deferred and not Path(flag).exists():  # not in the forecast
            _stand_still(Path(flag), seconds)
        return loss_of(self, *arguments)

    mock.patch.object(Trainer, "loss_of", slow).start()


def wait_in_evaluation(flag: str, held_out: int) -> None:
    """Make the online evaluation small, and stand still inside it."""
    from cfamc_cli.engine import journal, monitor

    mock.patch.object(journal, "HELD_OUT", held_out).start()
    evaluate = monitor.evaluate

    def slow(*arguments: Any, **settings: Any) -> Any:
        if not Path(flag).exists():
            _stand_still(Path(flag), 1)
        return evaluate(*arguments, **settings)  # asked to stop by now, it ends at once and is owed

    mock.patch.object(monitor, "evaluate", slow).start()


def wait_in_load(flag: str) -> None:
    """Stand still while the data are read."""
    from cfamc_cli.engine.data import sets

    load = sets.load

    def slow(*arguments: Any, **settings: Any) -> Any:
        if not Path(flag).exists():
            _stand_still(Path(flag), 60)
        return load(*arguments, **settings)

    mock.patch.object(sets, "load", slow).start()


def nan_at(step: int, value: str) -> None:
    """Make the loss of an update not finite."""
    from cfamc_cli.engine import objectives, pretrain

    loss_of = pretrain.Trainer.loss_of

    def poisoned(self: pretrain.Trainer, *arguments: Any) -> Any:
        z, terms = loss_of(self, *arguments)
        if self.step == step:
            terms = objectives.Terms(terms.loss * float(value), terms.parts)
        return z, terms

    mock.patch.object(pretrain.Trainer, "loss_of", poisoned).start()


def out_of_memory_at(step: int, kind: str) -> None:
    """Fail an allocation as the system's allocators do."""
    import torch

    from cfamc_cli.engine.pretrain import Trainer

    loss_of = Trainer.loss_of
    failure = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        "python": MemoryError(),
    }[kind]

    def full(self: Trainer, *arguments: Any) -> Any:
        if self.step == step:
            raise failure
        return loss_of(self, *arguments)

    mock.patch.object(Trainer, "loss_of", full).start()


def defect_at(step: int) -> None:
    """Raise what nobody foresaw."""
    from cfamc_cli.engine.pretrain import Trainer

    loss_of = Trainer.loss_of

    def broken(self: Trainer, *arguments: Any) -> Any:
        if self.step == step:
            raise ZeroDivisionError("a defect")
        return loss_of(self, *arguments)

    mock.patch.object(Trainer, "loss_of", broken).start()


def limit_memory(extra: int) -> None:
    """Allow this many more bytes of address space once training starts."""
    import resource

    from cfamc_cli.engine.pretrain import Trainer

    train = Trainer.train

    def limited(self: Trainer, *arguments: Any, **settings: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, most))
        try:
            return train(self, *arguments, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, most))

    allowed, most = resource.getrlimit(resource.RLIMIT_AS)
    mock.patch.object(Trainer, "train", limited).start()


def no_sockets() -> None:
    """Make every socket a failure that no handler takes for an ordinary one."""

    class Refused(socket.socket):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            os.write(2, b"a socket was opened\n")
            os._exit(99)

    mock.patch.object(socket, "socket", Refused).start()
    mock.patch.object(socket, "getaddrinfo", Refused).start()
    sys.addaudithook(lambda event, _: os._exit(98) if event in ("socket.__new__", "socket.connect") else None)


HOOKS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        kill_in_save,
        wait_in_save,
        wait_in_loss,
        wait_in_evaluation,
        wait_in_load,
        nan_at,
        out_of_memory_at,
        defect_at,
        limit_memory,
        no_sockets,
    )
}


def _child(request: Mapping[str, Any]) -> NoReturn:
    """Become a process of cfamc: streams, folder, environment, and the program's own entry."""
    code: object = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], os.O_WRONLY),
            (2, request["err"], os.O_WRONLY | os.O_NOCTTY),
        ):
            opened = os.open(path, flags)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, mode, closefd=False), "utf-8", "backslashreplace", write_through=True)
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        for number in request["closed"]:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        sys.argv = ["cfamc", *request["arguments"]]
        if request["hook"]:
            HOOKS[request["hook"]](*request["values"])
        from cfamc_cli.__main__ import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _serve() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, children would be deaf to it
    import cfamc_cli.commands.pretrain
    import cfamc_cli.engine.data.sets
    import cfamc_cli.engine.pretrain  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, object] = {"ready": True}
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        elif request["do"] == "poll":
            found, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if found else None}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
    os._exit(0)  # under load it takes more than half a minute to unload all that was imported
