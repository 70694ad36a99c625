"""Runs of the command line in processes that may die: a server that has loaded torch forks one for each.

    with Forks(model) as forks:
        ended = forks.run(folder, ["train", "recipe.yaml", …], doing="kill_before_step", n=5)
        ended.signal, ended.code, ended.out, ended.err

`doing` names a function below: it is called with `n` in the child before the command begins, and arranges
for the child to kill itself (SIGKILL: no handler, no `finally`, no flush) at the n-th time that something
happens.
Loading torch takes seconds and is done once; a fork takes none.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    signal: int  # that killed it; 0: none did
    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines() if line.endswith("}")]


class Forks:
    """Owns the server. model: a folder to load once beforehand, so that the children find all in place."""

    def __init__(self, model: Path) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)])}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forks", str(model)], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # which ends its loop
        self._server.wait()

    def run(self, cwd: Path, args: Sequence[str], doing: str = "nothing", n: int = 0) -> Ended:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(cwd), list(args), doing, n]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        out, err = ((cwd / name).read_text() for name in ("stdout", "stderr"))
        code = os.waitstatus_to_exitcode(status)
        return Ended(max(0, -code), max(0, code), out, err)


# --- what may be done to a child ---


def nothing(n: int) -> None:
    pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _counted(owner: Any, name: str, n: int, before: Callable[[], None] | None = None,
             after: Callable[[], None] | None = None) -> None:  # fmt: skip
    """Let `owner.name` do what it does, and something else before or after its n-th call."""
    do, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and before is not None:
            before()
        result = do(*args, **kwargs)
        if calls == n and after is not None:
            after()
        return result

    setattr(owner, name, counted)


def kill_between_steps(n: int) -> None:
    from burnish.backends.torch.learner import TorchLearner

    _counted(TorchLearner, "step", n, before=die)


def kill_after_gradients(n: int) -> None:
    """Inside a step: the gradients are there, the update is not. Step 0 is the rehearsal."""
    from burnish.backends.torch.learner import TorchLearner

    _counted(TorchLearner, "_gradients", n + 1, after=die)


def kill_after_update(n: int) -> None:
    """Inside a step: the weights have moved, and no one has heard of it."""
    import torch

    _counted(torch.optim.AdamW, "step", n, after=die)


def kill_in_save(n: int) -> None:
    """The n-th file of a checkpoint is half written."""
    from burnish.backends import adapter_folder

    def half_written(arrays: Any, path: Path, metadata: Any) -> None:
        save(arrays, path, metadata=metadata)
        calls.append(path)
        if len(calls) == n:
            raw = path.read_bytes()
            path.write_bytes(raw[: len(raw) // 2])
            die()

    save, calls = adapter_folder.save_file, []
    adapter_folder.save_file = half_written


def kill_before_state(n: int) -> None:
    """Every file of the n-th checkpoint is written but for its state (three files are summed for each)."""
    from burnish.runs import folder

    _counted(folder, "checksum", 3 * n, after=die)


def kill_between_renames(n: int) -> None:
    """`_swap`: the old folder has stepped aside and the new one is not there; the n-th time that happens."""
    _renames(n, aside=True)


def kill_after_renames(n: int) -> None:
    """`_swap`: the new folder is there, and so is the old one, aside."""
    _renames(n, aside=False)


def _renames(n: int, aside: bool) -> None:
    rename, calls = Path.rename, 0

    def renamed(self: Path, target: Path) -> Path:
        nonlocal calls
        result, steps_aside = rename(self, target), target.name.startswith(".tmp-old-")
        calls += steps_aside
        if calls == n and steps_aside == aside:
            die()
        return result

    Path.rename = renamed  # type: ignore[method-assign]


def kill_in_removal(n: int) -> None:
    """An old checkpoint is half removed."""
    rmtree, calls = shutil.rmtree, 0

    def removed(path: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        if Path(path).name.isdigit():
            calls += 1
            if calls == n:
                (Path(path) / "optimizer.safetensors").unlink()
                die()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = removed  # type: ignore[assignment]


def kill_in_record(n: int) -> None:
    """Half a line of the records has reached the disk."""
    from burnish.runs.folder import RunFolder

    record, calls = RunFolder.record, 0

    def recorded(self: RunFolder, event: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            for f in (self._events, self._metrics):
                assert f is not None
                f.write('{"event": "stepped", "step": 1')
                f.flush()
            die()
        record(self, event)

    RunFolder.record = recorded  # type: ignore[method-assign]


def kill_in_publish(n: int) -> None:
    """Training is over (or a best adapter was found) and the adapter folder is half written."""
    from burnish.runs.folder import RunFolder

    publish, calls = RunFolder.publish, 0

    def published(self: RunFolder, name: str, write: Callable[[Path], None]) -> Path:
        nonlocal calls
        calls += 1

        def fill(folder: Path) -> None:
            write(folder)
            die()

        return publish(self, name, fill if calls == n else write)

    RunFolder.publish = published  # type: ignore[method-assign]


def kill_in_take_back(n: int) -> None:
    """A resumed run dies while it takes its records back: one file is, the other is not."""
    from burnish.runs import folder

    _counted(folder, "write_text", n, after=die)


def terminate_in_step(n: int) -> None:
    from burnish.backends.torch.learner import TorchLearner

    _counted(TorchLearner, "_gradients", n + 1, after=lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupt_in_step(n: int) -> None:
    from burnish.backends.torch.learner import TorchLearner

    _counted(TorchLearner, "_gradients", n + 1, after=lambda: os.kill(os.getpid(), signal.SIGINT))


def interrupt_in_answer(n: int) -> None:
    from burnish.training import job

    _counted(job, "answer", n, after=lambda: os.kill(os.getpid(), signal.SIGINT))


def interrupt_twice_in_step(n: int) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    from burnish.backends.torch.learner import TorchLearner

    _counted(TorchLearner, "_gradients", n + 1, after=twice)


def _limited(verb: str, n: int, n_bytes: int) -> None:
    """From the n-th call on no file may grow beyond n_bytes: the kernel itself refuses to write (EFBIG)."""
    from burnish.runs.folder import RunFolder

    limit = (n_bytes, n_bytes)
    _counted(RunFolder, verb, n, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def no_room_in_save(n: int) -> None:
    _limited("save_checkpoint", n, 16_000)


def no_room_in_publish(n: int) -> None:
    _limited("publish", n, 6_000)


def no_room_in_record(n: int) -> None:
    _limited("record", n, 3_500)


# --- the server ---


def _child(cwd: str, args: list[str], doing: str, n: int) -> None:
    os.chdir(cwd)
    os.environ["HOME"] = cwd
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.argv = ["burnish", *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    globals()[doing](n)
    import burnish.cli

    burnish.cli.main()


def _serve() -> None:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from transformers import AutoModelForCausalLM

    import burnish.backends.torch.load
    import burnish.cli.app
    import burnish.cli.generate
    import burnish.cli.train  # noqa: F401

    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    gc.freeze()  # else the first collection in each child copies every page
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            _child(*asked)
            sys.exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    _serve()
