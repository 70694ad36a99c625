"""Runs of the command line, supervised as they always are, with faults in them: injected into the training
process at a chosen place, or done to the processes from outside. For tests/training/test_faults.py and
bench/faults.py.

    with Lane("torch") as lane:                     # a server that has loaded torch
        run = lane.start(folder, ["train", "recipe.yaml", …], [Fault("backward", 7, "oom")])
        os.kill(run.child(), signal.SIGKILL)
        ended = run.wait()
        fired(folder)                               # {0: 1}: the first fault was done once

The server forks the process of `burnish train`, and that one, where it would start its worker, forks again:
real processes with real pipes, signals and ends, of the unchanged supervise.py, process.py and worker.py, but
for the seconds in which each would load its framework. A fork of a process that has only imported MLX, and
computed nothing with it, is as good as a new one.

A fault is done `times` times over all processes of a run: what was done is noted in `folder/done` before.
`counted(folder)` says how often the last process came by each place.
"""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.errors import OutOfMemory

HERE = Path(__file__).parents[2]
BACK_OFF_S = (0.05,)
LIMIT_S = 120.0
FOR_EVER = 10**9

# name → module, class or '', attribute. 'layer' is what is computed most often: within a forward pass, a
# backward pass that recomputes, a score or an answer.
COMMON = {
    "file": ("burnish.backends.adapter_folder", "", "save_file"),
    "write": ("pathlib", "Path", "write_text"),
    "text": ("burnish.runs.folder", "", "write_text"),
    "sum": ("burnish.runs.folder", "", "checksum"),
    "sync": ("burnish.runs.atomic", "", "sync"),
    "rename": ("pathlib", "Path", "rename"),
    "remove": ("shutil", "", "rmtree"),
    "record": ("burnish.runs.folder", "RunFolder", "record"),
    "publish": ("burnish.runs.folder", "RunFolder", "publish"),
    "checkpoint": ("burnish.runs.folder", "RunFolder", "save_checkpoint"),
}  # fmt: skip
LEARNER = ("rehearse", "step", "_gradients", "score", "generate", "save", "load", "load_adapter")
PLACES = {
    "torch": {
        **COMMON,
        **{name: ("burnish.backends.torch.learner", "TorchLearner", name) for name in LEARNER},
        "forward": ("burnish.backends.torch.learner", "TorchLearner", "_inputs"),
        "layer": ("burnish.backends.torch.lora", "LoraLinear", "forward"),
        "loss": ("burnish.backends.torch.loss", "SlicedLoss", "forward"),
        "backward": ("burnish.backends.torch.loss", "SlicedLoss", "backward"),
        "optimizer": ("torch.optim", "AdamW", "step"),
    },
    "mlx": {
        **COMMON,
        **{name: ("burnish.backends.mlx.learner", "MlxLearner", name) for name in LEARNER},
        "forward": ("burnish.backends.mlx.engine", "Engine", "forward"),
        "layer": ("mlx.core", "", "eval"),
        "loss": ("burnish.backends.mlx.loss", "SlicedLoss", "gradient"),
        "backward": ("burnish.backends.mlx.engine", "Engine", "backward"),
        "optimizer": ("burnish.backends.mlx.optimizer", "AdamW", "stepped"),
    },
}
# As the frameworks write it themselves.
NO_MEMORY = {
    "torch": "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)",
    "mlx": "[metal::malloc] Attempting to allocate 137438953472 bytes which is greater than the maximum "
    "allowed buffer size of 28991029248 bytes.",
}


@dataclass(frozen=True)
class Fault:
    """At the n-th time that a process comes by `place`, and from then on until it was done `times` times.

    action: a signal's name, 'hang', 'oom' (OutOfMemory), 'memory' (Python's MemoryError), 'framework' (its
    own error of memory), 'nan' (at '_gradients'), an errno's name, 'half' (the file just written loses its
    second half, and SIGKILL), 'limit' (no file may grow beyond `limit_bytes` from now on).
    """

    place: str
    n: int
    action: str
    times: int = 1
    after: bool = False  # the call, not before it
    only_over: str = ""  # done only while this choice of the learner's plan, as 'micro_batch', …
    over: int = 0  # … is above this
    whom: str = "child"  # gets the signal; 'parent', or 'both'
    limit_bytes: int = 0


@dataclass(frozen=True)
class Ended:
    signal: int  # that ended the parent; 0: none did
    code: int
    in_time: bool


class Run:
    """One command that goes on. group: its process, and its process group's number."""

    def __init__(self, folder: Path, group: int, status: Callable[[float], int | None]) -> None:
        self.folder, self.group, self._status = folder, group, status
        self._ended: int | None = None

    def child(self) -> int:
        """The number of its training process; 0 where there is none now."""
        found = subprocess.run(["pgrep", "-P", str(self.group)], capture_output=True, text=True, check=False)
        return int(found.stdout.split()[0]) if found.stdout.split() else 0

    def ended(self, wait_s: float = 0.0) -> bool:
        if self._ended is None:
            self._ended = self._status(wait_s)
        return self._ended is not None

    def signal(self, number: int) -> None:
        """To the parent and its child, as a terminal does it."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        in_time = self.ended(limit_s)
        if not in_time:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self.ended(LIMIT_S)
        code = os.waitstatus_to_exitcode(self._ended or 0)
        return Ended(max(0, -code), max(0, code), in_time)


class Lane:
    """Owns a server, for one run at a time."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)])}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.faulty_worker", backend], env=env, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # which ends its loop
        self._server.wait()

    def start(self, folder: Path, args: Sequence[str], faults: Sequence[Fault] = ()) -> Run:
        """What it prints is appended to `folder/stdout` and `folder/stderr`."""
        assert self._server.stdin is not None
        asked = [str(folder), list(args), [asdict(f) for f in faults]]
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        group = self._said("began", None)
        assert group, "the server has ended"
        return Run(folder, group, functools.partial(self._said, "ended"))

    def _said(self, word: str, wait_s: float | None) -> int | None:
        assert self._server.stdout is not None
        if wait_s is not None and not select.select([self._server.stdout], [], [], wait_s)[0]:
            return None
        said, number = self._server.stdout.readline().decode().split()
        assert said == word, f"the run before was not waited for: {said}"
        return int(number)


def start_fresh(folder: Path, args: Sequence[str]) -> Run:
    """The same command as a person starts it: every process loads its framework itself."""
    with (folder / "stdout").open("ab") as out, (folder / "stderr").open("ab") as err:
        code = "from burnish.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args], cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip

    def status(wait_s: float) -> int | None:
        try:
            code = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None
        return -code if code < 0 else code << 8

    return Run(folder, process.pid, status)


def events(folder: Path) -> list[dict[str, Any]]:
    """All that its commands printed."""
    path = folder / "stdout"
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def fired(folder: Path) -> Counter[int]:
    path = folder / "done"
    return Counter(int(line) for line in path.read_text().split()) if path.exists() else Counter()


def counted(folder: Path) -> dict[str, int]:
    return json.loads((folder / "counts.json").read_text())


# --- in the training process ---


class _Doer:
    """Does a run's faults, and remembers in a file which it has done."""

    def __init__(self, folder: Path, backend: str, faults: Sequence[Fault]) -> None:
        self._folder, self._backend, self._faults = folder, backend, faults
        self._fired, self.calls = fired(folder), Counter[str]()

    def due(self, place: str, after: bool, args: Sequence[Any]) -> list[Fault]:
        found = []
        for number, f in enumerate(self._faults):
            done = self._fired[number]
            if (f.place, f.after) != (place, after) or done >= f.times:
                continue
            if self.calls[place] < f.n and not done:
                continue
            if f.only_over and getattr(args[0].plan, f.only_over).value <= f.over:
                continue
            self._fired[number] += 1
            with (self._folder / "done").open("ab") as log:
                log.write(f"{number}\n".encode())
            found.append(f)
        return found

    def act(self, fault: Fault, args: Sequence[Any]) -> None:
        action = fault.action
        if action == "half":
            path = Path(args[1])
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            action = "SIGKILL"
        if action.startswith("SIG"):
            number = signal.Signals[action]
            if fault.whom == "both":
                os.killpg(0, number)
            else:
                os.kill(os.getpid() if fault.whom == "child" else os.getppid(), number)
        elif action == "hang":
            time.sleep(FOR_EVER)
        elif action == "oom":
            raise OutOfMemory("a device asked for 128 GiB")
        elif action == "memory":
            raise MemoryError
        elif action == "framework":
            raise RuntimeError(NO_MEMORY[self._backend])
        elif action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit_bytes, fault.limit_bytes))
        elif action != "nan":
            number = getattr(errno, action)
            raise OSError(number, os.strerror(number))


def _wrap(owner: Any, name: str, place: str, doer: _Doer) -> None:
    do = getattr(owner, name)

    @functools.wraps(do)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        doer.calls[place] += 1
        for fault in doer.due(place, False, args):
            doer.act(fault, args)
            if fault.action == "nan":
                value = do(*args, **kwargs)
                return (float("nan"), value[1]) if isinstance(value, tuple) else float("nan")
        value = do(*args, **kwargs)
        for fault in doer.due(place, True, args):
            doer.act(fault, args)
        return value

    static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(faulty) if static else faulty)


def _work(folder: Path, backend: str, faults: Sequence[Fault]) -> int:
    """What `python -m burnish.training.worker` does, with faults."""
    from burnish.training import worker

    doer = _Doer(folder, backend, faults)
    for place, (module, cls, name) in PLACES[backend].items():
        owner = importlib.import_module(module)
        _wrap(getattr(owner, cls) if cls else owner, name, place, doer)
    code = worker.main()
    with suppress(OSError):
        (folder / "counts.json").write_bytes(json.dumps(doer.calls).encode())
    return code


class _Forked:
    """As much of subprocess.Popen as `training.process.Process` uses, for a fork of this process."""

    def __init__(
        self, work: Callable[[], int], _command: object, *, env: Mapping[str, str], encoding: str,
        errors: str, **_pipes: object,
    ) -> None:  # fmt: skip
        self.returncode: int | None = None
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        self.pid = os.fork()
        if self.pid == 0:
            _become(theirs, ours, env, work)
        for end in theirs:
            os.close(end)
        modes = ("w", "r", "r")
        opened = [open(end, m, encoding=encoding, errors=errors) for end, m in zip(ours, modes)]  # noqa: SIM115
        self.stdin, self.stdout, self.stderr = opened

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _become(
    theirs: Sequence[int], ours: Sequence[int], env: Mapping[str, str], work: Callable[[], int]
) -> None:
    """In the fork: the worker, and its end. Never returns, whatever happens."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, end in enumerate(theirs):
            os.dup2(end, number)
        for end in (*theirs, *ours):
            os.close(end)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        os.environ.update(env)
        code = work()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


# --- the server ---


def _parent(folder: str, args: Sequence[str], faults: Sequence[Fault], backend: str) -> None:
    """`burnish` with these arguments, in a process group of its own."""
    os.setsid()
    os.chdir(folder)
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = folder
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        end = os.open(name, flags, 0o644)
        os.dup2(end, number)
        os.close(end)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import burnish.cli.train
    from burnish.training import process
    from burnish.training.supervise import supervise

    work = functools.partial(_work, Path(folder), backend, faults)
    popen = functools.partial(_Forked, work)
    process.subprocess = types.SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE)  # type: ignore[assignment]
    burnish.cli.train.supervise = functools.partial(supervise, back_off=BACK_OFF_S)
    sys.argv = ["burnish", *args]
    burnish.cli.main()


def _serve(backend: str) -> None:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    if backend == "mlx":
        from burnish.backends import mlx_part

        mlx_part("load")
    else:
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        import burnish.backends.torch.load
    import burnish.cli.app
    import burnish.cli.train
    import burnish.training.job
    import burnish.training.worker  # noqa: F401

    gc.collect()
    gc.freeze()  # else the first collection in each fork copies every page
    for line in sys.stdin.buffer:
        folder, args, faults = json.loads(line)
        child = os.fork()
        if child == 0:
            code: object = 1
            try:
                _parent(folder, args, [Fault(**f) for f in faults], backend)
                code = 0
            except SystemExit as e:
                code = e.code
            except BaseException:
                traceback.print_exc()
                code = 130 if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 1
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code if isinstance(code, int) else int(code is not None))
        os.write(1, f"began {child}\n".encode())
        os.write(1, f"ended {os.waitpid(child, 0)[1]}\n".encode())


if __name__ == "__main__":
    _serve(sys.argv[1])
