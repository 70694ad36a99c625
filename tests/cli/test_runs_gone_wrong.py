"""Runs that have begun and go wrong, through the command line: what is said, the exit code, and that what was
saved before is whole and can be gone on from.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from burnish.backends.torch.learner import TorchLearner
from burnish.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    NonFinite,
    OutOfMemory,
    Unsupported,
)
from burnish.runs import atomic
from burnish.runs.folder import RunFolder, _read_state
from tests.training.forks import Forks
from tests.world import PAIRS, Said, World

STEPS = {"max_steps": 6, "save_every": 2, "eval_every": 3, "keep_last": 3}


@pytest.fixture
def begun(world: World) -> World:
    """A world whose recipe saves at steps 2, 4 and 6 of six, and validates at 3 and 6."""
    world.recipe(data={"valid_share": 0.25}, lora={"dropout": 0.1}, train=STEPS)
    return world


@pytest.fixture(scope="session")
def unspoilt(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, bytes]:
    """What the same recipe gives when nothing goes wrong."""
    world = World(tmp_path_factory.mktemp("unspoilt"), tiny_folder)
    world.recipe(data={"valid_share": 0.25}, lora={"dropout": 0.1}, train=STEPS)
    assert world.train().code == 0
    return files(world.out / "adapter")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def failed(said: Said, code: int, *parts: str) -> None:
    assert said.code == code, said
    assert "Traceback" not in said.err
    assert said.err.startswith("burnish: ")
    assert "\n  → " in said.err
    for part in parts:
        assert part in said.err, said.err


def whole(out: Path, *steps: int) -> None:
    """Exactly these checkpoints are there, each whole by its checksums, and nothing half-written."""
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == list(steps)
    for folder in (out / "checkpoints").iterdir():
        assert _read_state(folder).step == int(folder.name)
    assert not list(out.rglob(".tmp-*"))


def goes_on(world: World, unspoilt: dict[str, bytes]) -> Said:
    """--resume finishes the run, with the adapter that a run without the fault gives."""
    said = world.train("--resume")
    assert said.code == 0, said.err
    assert files(world.out / "adapter") == unspoilt
    return said


def at_call(n: int, do: Callable[..., Any], instead: Callable[[], Any]) -> Callable[..., Any]:
    """`do`, but its n-th call is `instead`."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return instead() if calls == n else do(*args, **kwargs)

    return counted


def from_call(n: int, do: Callable[..., Any], instead: Callable[[], Any]) -> Callable[..., Any]:
    """`do`, but from its n-th call on it is `instead`."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return instead() if calls >= n else do(*args, **kwargs)

    return counted


def throw(error: Exception) -> Callable[[], Any]:
    def raising() -> Any:
        raise error

    return raising


# --- numbers, memory, operations ---


def test_a_model_that_holds_a_nan(world: World):
    path = world.copied_model() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    said = world.train()
    failed(said, EXIT_FAILED, "left the finite range", "nan", "step 1", "nothing was updated", "train.lr")
    assert [e["event"] for e in said.events] == ["planned", "failed"]
    assert not (world.out / "checkpoints").exists() and not (world.out / "adapter").exists()


def test_a_loss_that_becomes_nan_leaves_the_checkpoints_whole(
    begun: World, unspoilt: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as m:
        error = throw(NonFinite("loss nan, gradient norm nan"))
        m.setattr(TorchLearner, "step", from_call(5, TorchLearner.step, error))
        said = begun.train()
    failed(said, EXIT_FAILED, "left the finite range", "step 5, twice, of the rows")
    assert said.event("noted")["message"] == "loss nan, gradient norm nan; the step is computed again, once"
    whole(begun.out, 2, 4)
    goes_on(begun, unspoilt)


@pytest.mark.parametrize("error", [NonFinite("loss nan"), OutOfMemory("no more")])
def test_what_happens_once_changes_nothing(
    begun: World, unspoilt: dict[str, bytes], error: Exception, monkeypatch: pytest.MonkeyPatch
):
    """The step is taken again, and not a bit is another."""
    monkeypatch.setattr(TorchLearner, "step", at_call(5, TorchLearner.step, throw(error)))
    said = begun.train()
    assert said.code == 0, said.err
    assert [e["step"] for e in said.events if e["event"] == "stepped"] == [1, 2, 3, 4, 5, 6]
    assert files(begun.out / "adapter") == unspoilt
    if isinstance(error, OutOfMemory):
        told = said.event("recovered")
        assert (told["step"], told["cause"], told["error"]) == (4, "out of memory", "no more")


def test_an_absurd_learning_rate_is_found_out_by_the_numbers(begun: World):
    said = begun.train("train.lr=1e30", "train.clip=null", "train.max_steps=20")
    failed(said, EXIT_FAILED, "left the finite range", "train.lr")
    assert not (begun.out / "adapter").exists()


def test_memory_that_runs_out_in_every_step(begun: World, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as m:
        error = throw(OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB\nmore of it"))
        m.setattr(TorchLearner, "step", from_call(3, TorchLearner.step, error))
        said = begun.train()
    failed(said, EXIT_OUT_OF_MEMORY, "memory ran out: CUDA out of memory. Tried to allocate 2 GiB\n")
    rungs = [e["did"] for e in said.events if e["event"] == "recovered"]
    assert len(rungs) > 2 and len(set(rungs)) == len(rungs), "every cut of the same training was tried"
    whole(begun.out, 2)
    # The advice can be followed: smaller numbers are another recipe, so they need another folder.
    assert "train.micro_batch=1" in said.err and "--out DIR" in said.err
    assert begun.train("train.micro_batch=1", out="smaller").code == 0
    again = begun.train("--resume")  # in the smallest cut; its masks are others, so its numbers are too
    assert again.code == 0, again.err
    assert again.event("planned")["summary"]["choices"]["micro_batch"]["value"] == 1


def test_an_operation_that_the_device_lacks(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TorchLearner, "step", at_call(1, TorchLearner.step, throw(Unsupported("no aten::x"))))
    failed(world.train(), EXIT_FAILED, "this backend cannot do it: no aten::x", "device=cpu")


def test_a_run_that_failed_before_it_saved_anything_is_begun_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.recipe(data={"valid_share": 0.25}, train={"eval_every": 1, "max_steps": 3})
    with monkeypatch.context() as m:
        m.setattr(TorchLearner, "step", from_call(2, TorchLearner.step, throw(OutOfMemory("no more"))))
        failed(world.train(), EXIT_OUT_OF_MEMORY)
    assert (world.out / "best").is_dir()
    said = world.train("train.micro_batch=1")
    assert said.code == 0, said.err
    assert [e["step"] for e in said.events if e["event"] == "stepped"] == [1, 2, 3]
    lines = (world.out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6  # three steps and three validations, none of the run before
    assert "micro_batch: 1" in (world.out / "recipe.yaml").read_text()


# --- folders that are taken, used, or of another recipe ---


def test_a_folder_that_holds_a_run(begun: World):
    assert begun.train().code == 0
    before = begun.tree()
    failed(begun.train(), EXIT_BAD_INPUT, "out holds a run already", "--resume", "--out DIR")
    assert begun.tree() == before


@pytest.fixture
def holder(begun: World) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of `out`, as a training one has."""
    code = (
        "import fcntl, os, sys; f = open('out/lock', 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.truncate(0);"
        "f.write(str(os.getpid())); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    begun.out.mkdir()
    with subprocess.Popen([sys.executable, "-c", code], cwd=begun.root, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use(begun: World, holder: subprocess.Popen[str]):
    said = begun.train()
    failed(said, EXIT_BAD_INPUT, f"out is in use by process {holder.pid}", "wait for it")
    assert sorted(p.name for p in begun.out.iterdir()) == ["lock"]
    shutil.copy(begun.root / "recipe.yaml", begun.out / "recipe.yaml")  # as if it had begun
    before = begun.tree()
    failed(begun.train("--resume"), EXIT_BAD_INPUT, f"out is in use by process {holder.pid}", "wait for it")
    assert begun.tree() == before
    holder.kill()
    holder.wait()
    assert begun.train().code == 0  # the system lets go of a dead process's lock


def test_resume_with_another_recipe_lists_what_differs(begun: World):
    assert begun.train().code == 0
    before = begun.tree()
    said = begun.train("--resume", "train.lr=0.5", "lora.rank=8", "train.batch_size=4")
    failed(said, EXIT_BAD_INPUT, "begun with another recipe:", "lora.rank: 2 → 8", "train.lr: 0.01 → 0.5",
           "new run with --out DIR")  # fmt: skip
    assert "batch_size" not in said.err, "what is the same is not listed"
    assert begun.tree() == before


@pytest.mark.parametrize("file", ["data.jsonl", "valid.jsonl"])
def test_resume_with_other_data(begun: World, file: str):
    begun.rows(PAIRS[:4], "valid.jsonl")
    begun.recipe(data={"valid": "valid.jsonl"})
    assert begun.train().code == 0
    begun.rows([*PAIRS[:3], {"prompt": "question 3", "completion": "another answer"}], file)
    checkpoints = {p: p.read_bytes() for p in begun.out.rglob("*.safetensors")}
    failed(begun.train("--resume"), EXIT_BAD_INPUT, "the data has changed since", "put the old data back")
    assert {p: p.read_bytes() for p in begun.out.rglob("*.safetensors")} == checkpoints


def test_resume_on_another_device_is_refused_by_name(begun: World):
    assert begun.train().code == 0
    plan = begun.out / "plan.json"
    plan.write_text(plan.read_text().replace('"value": "cpu"', '"value": "cuda"'))
    failed(begun.train("--resume"), EXIT_BAD_INPUT, "was begun elsewhere:", "device: cuda → cpu")


# --- damaged checkpoints ---


def bit_flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: bit_flipped(c / "optimizer.safetensors"), "optimizer.safetensors does not match"),
        (lambda c: bit_flipped(c / "adapter_model.safetensors"), "adapter_model.safetensors does not match"),
        (lambda c: (c / "optimizer.safetensors").unlink(), "No such file"),
        (lambda c: (c / "state.json").unlink(), "No such file"),
        (lambda c: (c / "state.json").write_text("{"), "damaged"),
        (lambda c: (c / "state.json").write_text("[]"), "damaged"),
    ],
    ids=["optimizer", "adapter", "file gone", "state gone", "state cut off", "state of another kind"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(
    begun: World, unspoilt: dict[str, bytes], damage: Callable[[Path], object], says: str
):
    assert begun.train().code == 0
    shutil.rmtree(begun.out / "adapter")
    damage(begun.out / "checkpoints" / "000006")
    said = goes_on(begun, unspoilt)
    assert said.event("planned")["resumed_at"] == 4
    note = said.event("noted")["message"]
    assert "checkpoint 000006 is damaged" in note and says in note and "passed over" in note
    assert [e["step"] for e in said.events if e["event"] == "stepped"] == [5, 6]
    whole(begun.out, 2, 4, 6)


def test_a_damaged_checkpoint_does_not_outlive_whole_ones(begun: World):
    """With keep_last=1, a damaged 6 must not be the one that is kept when step 5 is saved."""
    assert begun.train().code == 0
    bit_flipped(begun.out / "checkpoints" / "000006" / "optimizer.safetensors")
    with RunFolder.resume(begun.out, _recipe(begun)) as run:
        found = run.newest_checkpoint()
        assert found is not None and found[1].step == 4
        run.take_back(4)
    assert sorted(p.name for p in (begun.out / "checkpoints").iterdir()) == ["000002", "000004"]


def _recipe(world: World) -> Any:
    from burnish.recipe import load

    return load(str(world.out / "recipe.yaml"))


def test_no_whole_checkpoint_at_all(begun: World):
    assert begun.train().code == 0
    for folder in (begun.out / "checkpoints").iterdir():
        bit_flipped(folder / "optimizer.safetensors")
    said = begun.train("--resume")
    failed(said, EXIT_BAD_INPUT, "has no whole checkpoint:", "checkpoint 000002 is damaged",
           "checkpoint 000006 is damaged", "--out DIR")  # fmt: skip
    assert len(list((begun.out / "checkpoints").iterdir())) == 3, "they are not ours to remove"


# --- disks ---


def test_a_disk_full_in_a_save(begun: World, unspoilt: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    """Simulated: the second checkpoint's state file finds no room."""
    with monkeypatch.context() as m:
        no_room = throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        m.setattr("burnish.runs.folder.checksum", at_call(4, atomic.checksum, no_room))  # 3 files each
        said = begun.train()
    failed(said, EXIT_FAILED, "the disk is full", "checkpoints/000004 could not be written",
           "nothing of it was left behind", "--resume")  # fmt: skip
    whole(begun.out, 2)
    goes_on(begun, unspoilt)


@pytest.mark.parametrize(
    ("doing", "n", "what", "steps"),
    [
        ("no_room_in_save", 2, "checkpoints/000004", [2]),  # safetensors finds no room
        ("no_room_in_publish", 3, "out/adapter", [2, 4, 6]),  # the tokenizer's writer does
        ("no_room_in_record", 4, "out", []),  # the records themselves
    ],
)
def test_a_file_that_the_system_refuses_to_write(
    begun: World, forks: Forks, tmp_path_factory: pytest.TempPathFactory, doing: str, n: int, what: str,
    steps: list[int],
):  # fmt: skip
    """Real: the kernel refuses to write (EFBIG), in a process of its own."""
    if doing == "no_room_in_publish":  # an adapter smaller than the tokenizer
        begun.recipe(lora={"rank": 1, "targets": ["q_proj"], "last_layers": 1})
    args = ["train", "recipe.yaml", "--out", "out", "--json", "--in-process"]
    ended = forks.run(begun.root, args, doing, n)
    failed(Said(ended.code, ended.out, ended.err), EXIT_FAILED, what, "--resume")
    assert "the disk is full" in ended.err or "File too large" in ended.err
    assert not (begun.out / "adapter").exists()
    if steps:
        whole(begun.out, *steps)
    straight = World(tmp_path_factory.mktemp("straight"), begun.model)
    straight.recipe(**{k: v for k, v in begun.asked.items() if k in ("data", "lora", "train")})
    assert straight.train().code == 0
    goes_on(begun, files(straight.out / "adapter"))


def test_a_lock_that_finds_no_room(world: World, monkeypatch: pytest.MonkeyPatch):
    no_room = throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("burnish.runs.lock.sync", at_call(1, atomic.sync, no_room))
    failed(world.train(), EXIT_FAILED, "the disk is full", "free some space")


def test_records_on_a_full_device(world: World):
    """Real: /dev/full has room for nothing."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    world.out.mkdir()
    (world.out / "events.jsonl").symlink_to("/dev/full")
    failed(world.train(), EXIT_FAILED, "the records could not be written", "No space left", "free some space")


def test_an_output_that_may_not_be_written(world: World):
    """Permissions do not bind root, but no one can make a folder in /proc."""
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    failed(world.train(out="/proc/out"), EXIT_FAILED, "/proc/out cannot be made or written", "--out DIR")


def test_a_file_system_that_has_become_read_only(
    begun: World, unspoilt: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as m:
        refused = throw(OSError(errno.EROFS, os.strerror(errno.EROFS)))
        m.setattr(atomic, "_swap", at_call(3, atomic._swap, refused))  # 2, best at 3, then 4
        said = begun.train()
    failed(said, EXIT_FAILED, "checkpoints/000004 may not be written", "Read-only file system", "--out DIR")
    whole(begun.out, 2)
    goes_on(begun, unspoilt)


def test_a_missing_place_for_the_records_on_resume(begun: World):
    assert begun.train().code == 0
    (begun.out / "metrics.jsonl").unlink()
    (begun.out / "metrics.jsonl").mkdir()
    failed(begun.train("--resume"), EXIT_FAILED, "may not be written", "--out DIR")


# --- what a finished or unfinished run can be used for ---


def test_generate_from_an_unfinished_run(begun: World, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as m:
        m.setattr(TorchLearner, "step", from_call(4, TorchLearner.step, throw(OutOfMemory("no more"))))
        failed(begun.train(), EXIT_OUT_OF_MEMORY)
    said = begun.burnish("generate", "out", "hello")
    failed(said, EXIT_BAD_INPUT, "is a run without a finished adapter", "--resume")


def test_generate_with_an_adapter_of_another_model(begun: World):
    assert begun.train().code == 0
    config = begun.out / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    said = begun.burnish("generate", "out", "hello")
    assert said.code == EXIT_BAD_INPUT and "r: expected 2, got 4" in said.err, said.err
