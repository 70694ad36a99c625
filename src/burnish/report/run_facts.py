"""What a run folder tells of its run, as one value that JSON can hold; `run_page` and the terminal show it.

    told = run_facts(Path("runs/demo"))
    told["verdict"], told["next"]

Only files are read: no framework, no lock taken, nothing written, so a run that is going on is not disturbed.
Whatever is missing, half-written or of another kind than expected is left out, for a report is wanted most
where a run went wrong. Steps come thinned to a few hundred points; every extreme is kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

from burnish.errors import UserError
from burnish.recipe import load
from burnish.report.charts import of, series, short, smoothed_over
from burnish.report.page import clean, duration, event_lines, json_of, mapping, number, plain
from burnish.runs.lock import in_use

ENDS = ("finished", "interrupted", "failed")
MOVES = (*ENDS, "planned", "stepped", "recovered", "paused", "continued")
COUNTS = ("examples", "valid_examples", "tokens", "trained", "dropped", "truncated")
FEW_STEPS = 10  # fewer say nothing about a trend
WORDS = {
    "finished": "finished", "running": "running", "paused": "paused", "interrupted": "interrupted",
    "failed": "failed", "ended": "ended without a word",
}  # fmt: skip


def run_facts(folder: Path) -> dict[str, Any]:
    """Everything that is known of the run in `folder`. Raises UserError where there is none."""
    check_run(folder)
    events = event_lines(folder / "events.jsonl")
    whole = any(e["event"] == "stepped" for e in events)
    steps, valid = _kept(events if whole else event_lines(folder / "metrics.jsonl"))
    last = {e["event"]: e for e in events}
    plan = json_of(folder / "plan.json") or mapping(last.get("planned", {}).get("summary"))
    state = _state(folder, events, steps)
    told = {
        "run": str(folder),
        "state": state,
        **_asked(folder, plan),
        "data": _data(last.get("planned", {})),
        "losses": _losses(steps, valid, last.get("finished", {})),
        "series": series(steps, valid),
        "memory": _memory(plan, last, steps),
        "time": _time(events, steps),
        "samples": _samples(events),
        "scores": _scores(events),
        "troubles": [e for e in events if e["event"] in ("recovered", "skipped", "paused", "continued")],
        "notes": [plain(e.get("message")) for e in events if e["event"] == "noted"],
        "failure": _failure(folder, events) if state["kind"] == "failed" else None,
        "events": [{k: v for k, v in e.items() if k != "summary"} for e in events if e["event"] != "stepped"],
        "environment": json_of(folder / "environment.json"),
        "adapter": str(folder / "adapter") if (folder / "adapter").is_dir() else None,
        "exports": [json_of(p) | {"folder": str(p.parent)} for p in sorted(folder.glob("*/export.json"))],
    }
    told["changed"] = _changed(told)
    told["verdict"] = _verdict(told)
    told["next"] = _next(told, folder)
    return told


def check_run(folder: Path) -> None:
    """Raises UserError where `folder` is not there, is none, or holds no run."""
    hint = "name a folder that `burnish train` has written, such as runs/demo"
    if not folder.exists():
        raise UserError(f"{folder} is not there; expected a run folder", hint)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a run folder", hint)
    adapter = (folder / "adapter_config.json").is_file()  # an adapter folder has a recipe.yaml, too
    if (folder / "events.jsonl").is_file() or ((folder / "recipe.yaml").is_file() and not adapter):
        return
    if adapter and (folder.parent / "events.jsonl").is_file():
        hint = f"burnish report {shlex.quote(str(folder.parent))}"
    raise UserError(f"{folder} holds no run: there is no events.jsonl in it", hint)


# --- what stands ---


def _whole(value: object) -> int:
    return int(number(value) or 0)


def _kept(events: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and validations that stand: whatever was taken back and done again counts once."""
    steps: dict[int, dict[str, Any]] = {}
    valid: dict[int, dict[str, Any]] = {}
    for e in events:
        if e["event"] in ("planned", "recovered"):
            back = number(e.get("resumed_at" if e["event"] == "planned" else "step"))
            for known in (steps, valid):
                while known and back is not None and next(reversed(known)) > back:
                    known.popitem()
        elif e["event"] in ("stepped", "validated") and number(e.get("step")) is not None:
            known = steps if e["event"] == "stepped" else valid
            known.pop(_whole(e["step"]), None)
            known[_whole(e["step"])] = dict(e)
    return [steps[n] for n in sorted(steps)], [valid[n] for n in sorted(valid)]


# --- how it ended, or goes on ---


def _state(
    folder: Path, events: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    moves = [e for e in events if e["event"] in MOVES]
    last = moves[-1] if moves else {"event": ""}
    if last["event"] in ENDS:
        kind = last["event"]
    elif in_use(folder / "lock"):
        kind = "paused" if last["event"] == "paused" else "running"
    else:
        kind = "failed" if _failed_last(folder) else "ended"
    done = max(_whole(steps[-1]["step"]) if steps else 0, _whole(last.get("step")))
    plan = mapping(mapping(json_of(folder / "plan.json").get("choices")).get("steps"))
    whole = [int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if _is_checkpoint(p)]
    return {
        "kind": kind,
        "words": WORDS[kind],
        "step": done,
        "steps": _whole(steps[-1].get("steps") if steps else plan.get("value")),
        "checkpoint": max(whole, default=0),
        "paused_for": plain(last.get("why")) if kind == "paused" else "",
    }


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdecimal() and (path / "state.json").is_file()


def _failed_last(folder: Path) -> bool:
    """A full disk may have kept the last event from events.jsonl: then failure.json is the newer of them."""
    with suppress(OSError):
        return (folder / "failure.json").stat().st_mtime_ns >= (folder / "events.jsonl").stat().st_mtime_ns
    return False


def _failure(folder: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The post-mortem: what happened, in whose words, and what to do."""
    failed = [e for e in events if e["event"] == "failed"]
    told = json_of(folder / "failure.json") | dict(failed[-1] if failed else {})
    advice = told.get("try_", told.get("try"))
    tries = advice if isinstance(advice, list) else [advice] if advice else []
    return {
        "step": _whole(told.get("step")),
        "what": plain(told.get("what")),
        "error": plain(told.get("error")),
        "try": [plain(t) for t in tries],
        "diagnosis": plain(told.get("diagnosis")),
    }


# --- what it was ---


def _asked(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    path, text, recipe = folder / "recipe.yaml", "", {}
    with suppress(OSError):
        text = plain(path.read_bytes().decode("utf-8", errors="replace"))
    with suppress(UserError):  # of another version, or spoilt: its text is shown as it stands
        recipe = clean(load(str(path)).model_dump(mode="json"))
    values = {k: mapping(c).get("value") for k, c in mapping(plan.get("choices")).items()}
    model, train, lora = recipe.get("model", ""), recipe.get("train", {}), recipe.get("lora", {})
    layers, targets = values.get("layers"), values.get("targets")
    return {
        "name": recipe.get("name") or folder.name,
        "model": model,
        "engine": {
            k: values.get(k)
            for k in ("backend", "device", "weights", "compute", "quantize", "micro_batch", "pack")
        },
        "lora": {
            **{k: lora.get(k) for k in ("rank", "alpha", "dropout", "rslora", "targets")},
            "layers": len(layers) if isinstance(layers, list) else None,
            "projections": targets if isinstance(targets, list) else [],
        },
        "train": {
            k: train.get(k)
            for k in ("lr", "schedule", "batch_size", "epochs", "max_steps", "max_length", "seed")
        },
        "files": {k: recipe.get("data", {}).get(k) for k in ("train", "valid", "valid_share")},
        "recipe": text,
    }


def _data(planned: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: _whole(planned.get(name)) for name in COUNTS} if planned else {}
    share = 100 * counts["trained"] / counts["tokens"] if counts.get("tokens") else None
    return counts | {"trained_percent": share}


def _losses(
    steps: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]], finished: Mapping[str, Any]
) -> dict[str, Any]:
    """Means over the first and the last tenth of the steps: one step's loss depends on its rows."""
    loss = [y for _, y in of(steps, "loss")]
    known, tenth = [y for y in loss if y is not None], max(1, len(loss) // 10)
    scored = [(y, n) for n, y in of(valid, "loss") if y is not None]
    best, best_step = min(scored, default=(None, None))
    return {
        "first": fmean(known[:tenth]) if known else None,
        "last": fmean(known[-tenth:]) if known else None,
        "mean_of": tenth,
        "recorded": len(loss),
        "smoothed_over": smoothed_over(len(steps)),
        "not_finite": len(loss) - len(known),
        "valid_first": scored[0][0] if scored else None,
        "valid_last": scored[-1][0] if scored else None,
        "validations": len(scored),
        "best": best,
        "best_step": best_step,
        "adapter_step": _whole(finished.get("from_step")) or None,
        "accuracy": number(valid[-1].get("accuracy")) if valid else None,
    }


def _memory(
    plan: Mapping[str, Any], last: Mapping[str, Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Bytes: what was planned, by part, and what was measured of it. peak: since the model was opened."""
    rehearsed = mapping(plan.get("measured")) or last.get("rehearsed", {})
    peaks = [p for e in (*steps, last.get("finished", {})) if (p := number(e.get("peak_bytes")))]
    peak = max(peaks, default=None)
    total = number(plan.get("total_bytes"))
    parts = plan.get("estimate")
    return {
        "parts": [p for p in map(mapping, parts) if number(p.get("bytes"))]
        if isinstance(parts, list)
        else [],
        "predicted": total,
        "budget": number(plan.get("budget_bytes")),
        "rehearsed": number(rehearsed.get("peak_bytes")),
        "peak": peak,
        "off_percent": 100 * (total - peak) / peak if peak and total else None,
    }


def _time(events: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds. `other` (loading, answers, validation, saving) is known where one process did it all."""
    in_steps = [s for _, s in of(steps, "seconds") if s is not None]
    named = {kind: [e for e in events if e["event"] == kind] for kind in (*MOVES, "rehearsed")}

    def total(kind: str) -> float:
        return sum(number(e.get("seconds")) or 0.0 for e in named[kind])

    whole = total("finished") if len(named["finished"]) == len(named["planned"]) == 1 else None
    repeated = sum(_whole(e.get("repeated")) for e in named["recovered"])
    usual = median(in_steps or [0.0])
    known = {"steps": sum(in_steps), "rehearsal": total("rehearsed"), "recoveries": total("recovered")}
    known |= {"paused": total("continued")}
    other = max(0.0, whole - sum(known.values())) if whole is not None and not named["recovered"] else None
    return known | {
        "whole": whole,
        "other": other,
        "median_step": usual or None,
        "sessions": len(named["planned"]),
        "repeated_steps": repeated,
        "lost": known["recoveries"] + repeated * usual,
    }


def _samples(events: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Question, answer before, answer after; of several answers to a question the last one stands."""
    found: dict[str, dict[str, str]] = {}
    for e in events:
        if e["event"] == "answered" and e.get("when") in ("before", "after"):
            sample = found.setdefault(plain(e.get("question")), {"question": plain(e.get("question"))})
            notes = ["cut at generation.max_new_tokens"] if e.get("finish") == "length" else []
            notes += [f"by a fallback, {plain(e['rung'])}: {plain(e.get('reason'))}"] if e.get("rung") else []
            sample |= {e["when"]: plain(e.get("answer")), f"{e['when']}_note": "; ".join(notes)}
    return list(found.values())


def _scores(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each task: correct, total and percent, before and after."""
    found: dict[str, dict[str, Any]] = {}
    for e in events:
        if e["event"] == "scored" and e.get("when") in ("before", "after") and _whole(e.get("total")) > 0:
            right, total = _whole(e.get("correct")), _whole(e["total"])
            score = {"correct": right, "total": total, "percent": 100 * right / total}
            task = plain(e.get("task"))
            found.setdefault(task, {"task": task})[e["when"]] = score
    return list(found.values())


# --- in words ---


def _changed(told: Mapping[str, Any]) -> list[str]:
    """What training changed, a sentence each: scores first, for they are what a person wants."""
    said, loss = [], told["losses"]
    for score in told["scores"]:
        parts = [
            f"{score[w]['percent']:.1f} % {w} training ({score[w]['correct']:,} of {score[w]['total']:,})"
            for w in ("before", "after")
            if w in score
        ]
        said.append(f"{score['task'].replace('-', ' ')}: {', '.join(parts)}")
    if loss["best"] is not None:
        kept = f"; the adapter is of step {loss['adapter_step']:,}" if loss["adapter_step"] else ""
        said.append(f"validation loss: {short(loss['best'])} at best, at step {loss['best_step']:,}{kept}")
        if loss["valid_last"] > 1.05 * loss["best"]:
            said.append(f"after that it rose to {short(loss['valid_last'])}: more steps only learnt by heart")
    if loss["first"] is not None and loss["recorded"] >= FEW_STEPS:
        means = f", means of {loss['mean_of']:,} steps" if loss["mean_of"] > 1 else ""
        said.append(f"training loss: from {short(loss['first'])} to {short(loss['last'])}{means}")
    if loss["not_finite"]:
        said.append(f"the loss was not finite in {loss['not_finite']:,} steps")
    return said


def _verdict(told: Mapping[str, Any]) -> str:
    """How it stands and whether it worked, in a sentence or two."""
    state, loss, time = told["state"], told["losses"], told["time"]
    at = f"{state['step']:,} of {state['steps']:,} steps" if state["steps"] else f"{state['step']:,} steps"
    kind, failure = state["kind"], told["failure"]
    again = f"it can go on from step {state['checkpoint']:,}" if state["checkpoint"] else "nothing was saved"
    if kind == "failed":
        why = failure["what"] or failure["error"] or "the reason was not recorded"
        return f"Failed after {at}: {why.rstrip('.')}. {again.capitalize()}."
    if kind in ("interrupted", "ended"):
        return f"{state['words'].capitalize()} after {at}; {again}."
    if kind in ("running", "paused"):
        why = f" ({state['paused_for']})" if state["paused_for"] else ""
        return f"{state['words'].capitalize()}{why}: {at} so far."
    took = f" in {duration(time['whole'])}" if time["whole"] else ""
    return f"Finished: {at}{took}; {_worked(told, loss)}."


def _worked(told: Mapping[str, Any], loss: Mapping[str, Any]) -> str:
    for score in told["scores"]:
        if "before" in score and "after" in score:
            a, b = score["before"]["percent"], score["after"]["percent"]
            how = "better" if b > a else "worse" if b < a else "no better"
            return f"{how} at {score['task'].replace('-', ' ')} than before, {a:.1f} % → {b:.1f} %"
    if loss["first"] is None or loss["recorded"] < FEW_STEPS:
        return "too few steps to say whether it learnt"
    if loss["last"] < 0.98 * loss["first"]:
        return f"the loss fell from {short(loss['first'])} to {short(loss['last'])}"
    return f"the loss did not fall: {short(loss['first'])} at first, {short(loss['last'])} at last"


def _next(told: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """What to do now: a sentence, and a command ('' where there is none)."""
    run = shlex.quote(str(folder))
    kind, step = told["state"]["kind"], told["state"]["checkpoint"]
    if kind == "finished":
        out = shlex.quote(f"{folder}-ollama")
        return [
            {"what": "Ask it something", "command": f"burnish generate {run} 'your question'"},
            {"what": "Use it in Ollama", "command": f"burnish export {run} {out} --to ollama"},
        ]
    if kind in ("running", "paused"):
        return [{"what": "Look again later", "command": f"burnish report {run}"}]
    advice = [{"what": t, "command": ""} for t in told["failure"]["try"]] if kind == "failed" else []
    if kind == "failed" and not step:  # as it was it would only fail again
        recipe = shlex.quote(str(folder / "recipe.yaml"))
        command = f"burnish train {recipe} --out {run}"
        return [*advice, {"what": "Begin again, with what was changed behind it", "command": command}]
    what = f"Go on from step {step:,}" if step else "Begin again"
    return [*advice, {"what": what, "command": f"burnish resume {run}"}]
