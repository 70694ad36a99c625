"""What a run folder tells: of real runs, of folders put together by hand, and of spoilt ones."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.report.run_facts import run_facts
from burnish.runs.lock import in_use
from tests.world import World

PLANNED = {
    "event": "planned", "examples": 10, "valid_examples": 2, "tokens": 100, "trained": 25, "dropped": 0,
    "truncated": 0, "resumed_at": 0,
}  # fmt: skip


def stepped(n: int, steps: int = 40, **changes: Any) -> dict[str, Any]:
    return {
        "event": "stepped", "step": n, "steps": steps, "loss": 2.0 - n / 50, "lr": 1e-4, "grad_norm": 0.5,
        "tokens": 100, "seconds": 0.5, "now_bytes": 2 << 30, "peak_bytes": 3 << 30, **changes,
    }  # fmt: skip


def folder_of(root: Path, *events: dict[str, Any], checkpoints: tuple[int, ...] = ()) -> Path:
    root.mkdir(exist_ok=True)
    (root / "recipe.yaml").write_text("name: mine\nmodel: base\n")
    (root / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    for n in checkpoints:
        (root / "checkpoints" / f"{n:06d}").mkdir(parents=True)
        (root / "checkpoints" / f"{n:06d}" / "state.json").write_text("{}")
    return root


def steps(first: int, last: int) -> list[dict[str, Any]]:
    return [stepped(n) for n in range(first, last + 1)]


# --- real runs ---


def test_a_real_run_is_told_whole(world: World):
    world.rows([{"prompt": "q?", "completion": "a"}] * 3, "valid.jsonl")
    world.recipe(
        data={"valid": "valid.jsonl"}, ask=["why?"], evaluate={"task": "exact-match"},
        train={"max_steps": 3, "eval_every": 1},
    )  # fmt: skip
    assert world.train().code == 0
    told = run_facts(world.out)
    heard = [json.loads(line) for line in (world.out / "events.jsonl").read_text().splitlines()]
    of = {e["event"]: e for e in heard}
    assert told["state"] | {"words": ""} == {
        "kind": "finished", "words": "", "step": 3, "steps": 3, "checkpoint": 3, "paused_for": "",
    }  # fmt: skip
    assert told["series"]["loss"] == [(e["step"], e["loss"]) for e in heard if e["event"] == "stepped"]
    assert told["series"]["valid"] == [(e["step"], e["loss"]) for e in heard if e["event"] == "validated"]
    assert told["memory"]["peak"] == of["finished"]["peak_bytes"] and told["memory"]["parts"]
    assert told["memory"]["rehearsed"] == of["rehearsed"]["peak_bytes"]
    assert told["losses"]["adapter_step"] == of["finished"]["from_step"]
    assert told["time"]["whole"] == of["finished"]["seconds"] and told["time"]["other"] > 0
    (sample,) = told["samples"]
    assert sample["question"] == "why?" and {"before", "after"} <= set(sample)
    (score,) = told["scores"]
    assert score["before"]["total"] == score["after"]["total"] == 3
    assert told["data"]["examples"] == 12 and told["lora"]["rank"] == 2 and told["train"]["lr"] == 0.01
    assert told["adapter"] == str(world.out / "adapter") and told["environment"]["versions"]["torch"]
    json.dumps(told, allow_nan=False)


def test_the_command_to_go_on_goes_on(world: World):
    """An interrupted run: what the report advises is what finishes it."""
    assert world.train("train.save_every=1").code == 0
    events = [json.loads(line) for line in (world.out / "events.jsonl").read_text().splitlines()]
    cut = [e for e in events if e["event"] in ("planned", "rehearsed") or e.get("step") == 1]
    (world.out / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in cut))
    for name in ("adapter", "checkpoints/000002"):
        (world.out / name).rename(world.root / name.replace("/", "-"))
    told = run_facts(world.out)
    assert told["state"]["kind"] == "ended" and told["state"]["checkpoint"] == 1
    assert "go on from step 1" in told["verdict"]
    (step,) = told["next"]
    assert world.burnish(*step["command"].split()[1:]).code == 0
    assert run_facts(world.out)["state"]["kind"] == "finished"


# --- states ---


def test_every_end_is_told(tmp_path: Path):
    for kind, last in (
        ("interrupted", {"event": "interrupted", "step": 12}),
        ("failed", {"event": "failed", "step": 12, "what": "no room", "try_": "less", "error": "E"}),
        ("finished", {"event": "finished", "step": 12, "seconds": 99, "from_step": 12}),
        ("ended", {"event": "noted", "message": "nothing"}),
    ):
        told = run_facts(folder_of(tmp_path / kind, PLANNED, *steps(1, 12), last, checkpoints=(5, 10)))
        assert told["state"]["kind"] == kind and told["state"]["step"] == 12
        assert told["state"]["checkpoint"] == 10
        assert ("step 10" in told["verdict"]) == (kind != "finished")
    assert run_facts(tmp_path / "failed")["next"][0] == {"what": "less", "command": ""}
    assert "no room" in run_facts(tmp_path / "failed")["verdict"]


def test_a_run_that_went_on_after_its_end_is_not_ended_by_it(tmp_path: Path):
    run = folder_of(
        tmp_path / "r", PLANNED, *steps(1, 5), {"event": "interrupted", "step": 5},
        {**PLANNED, "resumed_at": 5}, *steps(6, 8),
    )  # fmt: skip
    assert run_facts(run)["state"]["kind"] == "ended"


def test_a_run_that_holds_its_lock_is_running_or_paused(tmp_path: Path):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 5))
    with (run / "lock").open("w") as lock:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert run_facts(run)["state"]["kind"] == "running"
        with (run / "events.jsonl").open("a") as f:
            f.write('{"event": "paused", "step": 5, "why": "heat"}\n{"event": "stepp')
        told = run_facts(run)
        assert told["state"]["kind"] == "paused" and told["verdict"].startswith("Paused (heat): 5 of 40")
    assert run_facts(run)["state"]["kind"] == "ended"


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path):
    """Another process takes it while this one looks: never refused."""
    lock = tmp_path / "lock"
    lock.write_text("1\n")
    code = (
        "import fcntl, sys\nfor _ in range(3000):\n    with open(sys.argv[1], 'a') as f:\n"
        "        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    )
    taker = subprocess.Popen([sys.executable, "-c", code, str(lock)], stderr=subprocess.PIPE)
    while taker.poll() is None:
        in_use(lock)
    assert taker.returncode == 0, taker.communicate()


@pytest.mark.parametrize("written", ["", "no number", "999999999", "9" * 50, "1\n2"])
def test_a_lock_of_nobody_is_not_in_use(tmp_path: Path, written: str):
    (tmp_path / "lock").write_text(written)
    assert not in_use(tmp_path / "lock")
    assert not in_use(tmp_path / "no lock")


def test_failure_json_tells_what_a_full_disk_kept_from_the_events(tmp_path: Path):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 5), checkpoints=(4,))
    failure = {"step": 5, "what": "the disk is full", "try": ["free space", "then go on"], "error": "E28"}
    (run / "failure.json").write_text(json.dumps(failure))
    os.utime(run / "events.jsonl", (1, 1))
    told = run_facts(run)
    assert told["state"]["kind"] == "failed" and "the disk is full" in told["verdict"]
    assert [s["what"] for s in told["next"]] == ["free space", "then go on", "Go on from step 4"]
    os.utime(run / "failure.json", (0, 0))  # of an earlier attempt
    assert run_facts(run)["state"]["kind"] == "ended"


# --- what stands, and how much ---


def test_steps_that_were_taken_back_count_once(tmp_path: Path):
    recovered = {"event": "recovered", "step": 6, "cause": "killed", "repeated": 4, "seconds": 7.0}
    again = [stepped(n, loss=9.0) for n in (7, 8)]
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 10), recovered, *again)
    told = run_facts(run)
    assert [n for n, _ in told["series"]["loss"]] == list(range(1, 9))
    assert told["series"]["loss"][-1] == (8, 9.0)
    assert told["time"]["repeated_steps"] == 4 and told["time"]["lost"] == 7.0 + 4 * 0.5
    assert told["troubles"] == [recovered]


def test_time_is_divided_only_where_one_process_did_it_all(tmp_path: Path):
    end = {"event": "finished", "step": 4, "seconds": 10.0, "from_step": 4}
    rehearsed = {"event": "rehearsed", "seconds": 1.0}
    whole = run_facts(folder_of(tmp_path / "a", PLANNED, rehearsed, *steps(1, 4), end))["time"]
    assert (whole["steps"], whole["rehearsal"], whole["other"], whole["whole"]) == (2.0, 1.0, 7.0, 10.0)
    again = {**PLANNED, "resumed_at": 2}
    parts = run_facts(folder_of(tmp_path / "b", PLANNED, *steps(1, 2), again, *steps(3, 4), end))["time"]
    assert parts["other"] is None and parts["whole"] is None and parts["sessions"] == 2


def test_better_and_worse_are_said(tmp_path: Path):
    def scored(when: str, right: int) -> dict[str, Any]:
        return {"event": "scored", "when": when, "task": "exact-match", "correct": right, "total": 50}

    end = {"event": "finished", "step": 12, "seconds": 9.0, "from_step": 12}
    for name, a, b, how in (("x", 5, 20, "; better"), ("y", 20, 5, "; worse"), ("z", 5, 5, "no better")):
        run = folder_of(tmp_path / name, PLANNED, scored("before", a), *steps(1, 12), scored("after", b), end)
        assert how in run_facts(run)["verdict"]
        assert f"{2 * a:.1f} % → {2 * b:.1f} %" in run_facts(run)["verdict"]
    flat = [stepped(n, loss=2.0) for n in range(1, 41)]
    assert "did not fall" in run_facts(folder_of(tmp_path / "flat", PLANNED, *flat, end))["verdict"]
    assert "loss fell" in run_facts(folder_of(tmp_path / "fell", PLANNED, *steps(1, 40), end))["verdict"]
    assert "too few" in run_facts(folder_of(tmp_path / "few", PLANNED, *steps(1, 3), end))["verdict"]


def test_overfitting_is_said(tmp_path: Path):
    valid = [{"event": "validated", "step": n, "loss": y} for n, y in ((4, 1.0), (8, 0.5), (12, 0.9))]
    told = run_facts(folder_of(tmp_path / "r", PLANNED, *steps(1, 12), *valid))
    assert told["losses"]["best"] == 0.5 and told["losses"]["best_step"] == 8
    assert any("rose to 0.9" in line for line in told["changed"])


# --- spoilt folders ---


def test_nothing_but_a_recipe(tmp_path: Path):
    told = run_facts(folder_of(tmp_path / "r"))
    assert told["state"]["kind"] == "ended" and told["verdict"].endswith("nothing was saved.")
    assert told["next"][0]["what"] == "Begin again"


def test_metrics_stand_in_for_events(tmp_path: Path):
    run = folder_of(tmp_path / "r", {"event": "finished", "step": 3, "seconds": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in steps(1, 3)))
    told = run_facts(run)
    assert len(told["series"]["loss"]) == 3 and told["state"]["kind"] == "finished"


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "stepped", "step": 13, "loss": NaN, "tokens": null, "seconds": 0}',
        '{"event": "stepped", "step": 13, "loss": 1e400, "lr": "much", "peak_bytes": -Infinity}',
        '{"event": "stepped", "step": "x"}', '{"event": "stepped"}', '{"event": "stepped", "step": true}',
        '{"event": "planned", "summary": [], "tokens": "many"}', '{"event": "planned"}',
        '{"event": "scored", "when": "after", "total": 0}', '{"event": "answered", "when": "before"}',
        '{"event": "finished"}', '{"event": "failed"}', '{"event": "validated", "step": 2, "loss": NaN}',
        '{"event": "answered", "when": "after", "question": "\\ud800 \\u2028 \\u001b[2J", "answer": 7}',
        '{"event": "recovered"}', '{"event": 7}', "[]", "null", "{", "[" * 9000, '{"event": "step\ufffd',
        '{"event": "stepped", "step": 13, "loss": ' + "9" * 400 + "}", '{"event": "paused", "why": {"a": 1}}',
    ],
)  # fmt: skip
def test_no_line_breaks_it(tmp_path: Path, line: str):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 12))
    with (run / "events.jsonl").open("a") as f:
        f.write(f"{line}\n")
    told = run_facts(run)
    assert len(told["series"]["loss"]) >= 11 or "planned" in line
    text = json.dumps(told, allow_nan=False, ensure_ascii=False)
    text.encode()
    assert "\x1b" not in text and "\\u001b" not in text


def test_a_line_ends_at_a_newline_only(tmp_path: Path):
    run = folder_of(tmp_path / "r", PLANNED)
    answer = {"event": "answered", "when": "after", "question": "q", "answer": "one\u2028two\u0085three"}
    with (run / "events.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(answer, ensure_ascii=False) + "\n")
    assert run_facts(run)["samples"][0]["after"] == "one\u2028two\ufffdthree"


def test_files_that_are_no_json_are_passed_over(tmp_path: Path):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 3))
    for name in ("plan.json", "environment.json", "failure.json"):
        (run / name).write_bytes(b"\xff{")
    (run / "recipe.yaml").write_bytes(b"name: [\xff")
    (run / "x").mkdir()
    (run / "x" / "export.json").write_text("[]")
    told = run_facts(run)
    assert told["name"] == "r" and told["recipe"].startswith("name: [") and told["memory"]["parts"] == []
    assert told["exports"] == [{"folder": str(run / "x")}]


def test_no_run_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    for place, words in (("none", "is not there"), ("file", "is a file"), (".", "holds no run")):
        with pytest.raises(UserError, match=words):
            run_facts(tmp_path / place)
    run = folder_of(tmp_path / "run", PLANNED)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").touch()
    (run / "adapter" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="holds no run") as caught:
        run_facts(run / "adapter")
    assert caught.value.hint == f"burnish report {run}"


def test_no_framework_is_loaded():
    code = (
        "import sys\nimport burnish.cli.report\n"
        "print([m for m in ('torch', 'mlx', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
