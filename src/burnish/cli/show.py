"""Everything a person sees in a terminal. Facts come in as values; only here do bytes become GiB.

Where stdout is a terminal, training has a live line; elsewhere (a file, a pipe, CI) plain lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from burnish.runs.events import (
    Answered,
    Continued,
    Event,
    Failed,
    Finished,
    Interrupted,
    Noted,
    Paused,
    Planned,
    Recovered,
    Rehearsed,
    Saved,
    Scored,
    Skipped,
    Stepped,
    Validated,
    as_json,
)

TIGHT = 0.9  # of the budget


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process, and with it a run; whoever prints here decides."""
        raise


def console() -> Console:
    wide = None if sys.stdout.isatty() else 110
    return _Console(highlight=False, width=wide, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def gib(n_bytes: float) -> str:  # as report.page has it, whose imports `burnish plan` does without
    return f"{n_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def verdict(summary: Mapping[str, Any]) -> str:
    need, have = summary["total_bytes"], summary["budget_bytes"]
    if need > have:
        return f"does not fit: needs {gib(need)}, budget {gib(have)}"
    # What is spent on speed where there is room makes nothing tight.
    tight = summary.get("least_bytes", need) > TIGHT * have
    return f"{'fits, but tightly' if tight else 'fits'}: needs {gib(need)} of {gib(have)}"


def rehearsed_text(e: Rehearsed) -> str:
    memory = f"{gib(e.peak_bytes)} measured, {e.predicted_bytes / 2**30:.2f} predicted"
    return f"rehearsed the longest step: {memory} ({e.error_percent:+.1f} %), {e.seconds:.1f} s"


def trained_text(pieces: Sequence[tuple[str, bool]]) -> Text:
    """Text with what is trained in green; where there are no colours, trained stretches stand in ⟦ ⟧."""
    plain = not sys.stdout.isatty()
    text = Text()
    for piece, trained in pieces:
        text.append(f"⟦{piece}⟧" if plain and trained else piece, style="bold green" if trained else "dim")
    return text


def data_text(told: Mapping[str, Any], show: int) -> Text:
    """What `burnish data` found: the verdict first, then how, how much, warnings, and `show` examples."""
    text = Text()

    def say(line: str, style: str = "") -> None:
        text.append(f"{line}\n", style=style)

    say(told["verdict"], "bold yellow" if told["warnings"] else "bold green")
    say(f"format: {told['format']} ({told['why']}), {told['container']}")
    why = f" ({told['template_why']})" if told["template_why"] else ""
    say(f"template: {told['template']}{why}")
    if told["trimmed"]:
        say(f"  outer white space of {told['trimmed']:,} texts is removed by it")
    if told["normalized"]:
        say(f"  the tokenizer brings the text of {told['normalized']:,} rows into a normal form of Unicode")
    if told["thoughts_dropped"]:
        say(f"  reasoning cut out of {told['thoughts_dropped']:,} answers (data.thinking: drop)")
    for title, part in (("training", told["train"]), ("validation", told["valid"])):
        if part["rows"] or part["dropped"]:
            for line in _part_lines(title, part, told["max_length"]):
                say(line)
        if title == "training":
            say(_histogram(part["histogram"]))
    if told["held_out"]:
        say("  (taken from the training rows: data.valid_share)")
    padding = told["padding"]
    say(
        f"padding: {100 * padding['unpacked']:.1f} % of positions with one example a row, "
        f"{100 * padding['packed']:.1f} % packed into rows of {padding['row_length']:,} "
        f"(train.pack={str(padding['asked']).lower()}; `burnish plan` says which, and why)"
    )
    for warning in told["warnings"]:
        say(f"warning: {warning['message']}", "yellow")
        for place in warning["places"]:
            say(f"  {place}")
        say(f"  → {warning['hint']}", "dim")
    for number, (pieces, at) in enumerate(zip(told["examples"], told["example_places"], strict=True), 1):
        if number <= show:
            say(f"\n--- example {number}, {at} ---")
            text.append(trained_text([(p["text"], p["trained"]) for p in pieces])).append("\n")
    text.right_crop(1)
    return text


def _histogram(bins: Sequence[Mapping[str, int]]) -> str:
    most, wide = max(b["rows"] for b in bins), len(f"{bins[-1]['to']:,}")
    return "\n".join(  # bars are rounded up: a single row is seen too
        f"  {b['from']:>{wide},}–{b['to']:<{wide},} {b['rows']:>7,} {'█' * -(-32 * b['rows'] // most)}"
        for b in bins
    )


def _part_lines(title: str, part: Mapping[str, Any], max_length: int) -> list[str]:
    lines = [
        f"{title}: {part['rows']:,} rows, {part['tokens']:,} tokens, {part['trained']:,} trained "
        f"({part['trained_percent']:.1f} %)",
        f"  tokens a row: shortest {part['shortest']}, median {part['median']}, 95 % below {part['p95']}, "
        f"longest {part['longest']} (train.max_length {max_length})",
    ]
    if part["reasoning"] or part["tool_calls"]:
        lines.append(
            f"  {part['answers']:,} answers, {part['reasoning']:,} with reasoning, "
            f"{part['tool_calls']:,} tool calls"
        )
    if part["dropped"] or part["truncated"]:
        lines.append(f"  {part['dropped']:,} rows left out, {part['truncated']:,} cut")
    return lines


class TrainView:
    """Hears a run's events and shows them; owns the live line while there is one."""

    def __init__(self, log_every: int) -> None:
        self._console, self._log_every = console(), log_every
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self._began, self._planned_once = time.monotonic(), False

    def __enter__(self) -> TrainView:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            with suppress(OSError):  # the terminal is gone
                self._progress.stop()
            self._progress = None

    def hear(self, event: Event) -> None:
        match event:
            case Planned():
                self._planned(event)
            case Rehearsed():
                self._line(rehearsed_text(event))
            case Answered():
                self._answered(event)
            case Scored():
                self._line(
                    f"{event.task} {event.when} training: {event.percent:.1f} % "
                    f"({event.correct} of {event.total})"
                )
            case Stepped():
                self._stepped(event)
            case Validated():
                mark = "  (best so far)" if event.best else ""
                self._line(
                    f"step {event.step}: validation loss {event.loss:.4f}, "
                    f"next-token accuracy {100 * event.accuracy:.1f} %{mark}"
                )
            case Saved():
                self._line(f"step {event.step}: saved {event.folder}")
            case Noted():
                self._line(event.message)
            case Recovered():
                again = f"; {event.repeated} steps are done again" if event.repeated else ""
                self._line(f"after step {event.step}: {event.cause}; {event.did}{again}")
            case Skipped():
                self._line(f"step {event.step} was left out: {event.error} (rows {', '.join(event.rows)})")
            case Paused():
                self._line(f"paused after step {event.step}: {event.words}")
            case Continued():
                self._line(f"goes on after step {event.step}, after {duration(event.seconds)}")
            case Failed():  # the command line says errors
                pass
            case Interrupted():
                self._line(
                    f"interrupted after step {event.step}; the same command with --resume goes on from there"
                )
            case Finished():
                self._finished(event)

    def _line(self, text: str) -> None:
        self._console.print(text)

    def _planned(self, e: Planned) -> None:
        if self._planned_once:  # a new process goes on: all this was said
            return
        self._planned_once = True
        choices = e.summary["choices"]
        values = {k: choices[k]["value"] for k in choices}
        self._line(
            f"run {e.out}: {e.examples} examples ({e.tokens} tokens, {e.trained} of them trained), "
            f"{e.valid_examples} to validate on"
        )
        if e.dropped or e.truncated:
            self._line(f"  {e.dropped} rows left out and {e.truncated} cut: too long, or nothing to train")
        keep, layers = values["keep_layers"], len(values["layers"])
        self._line(
            f"  {values['backend']} on {values['device']}, weights {values['weights']}"
            f"{'' if values['quantize'] == 'none' else ' ' + values['quantize']}; "
            f"computing in {values['compute']}; "
            f"micro-batch {values['micro_batch']}"
            f"{' packed rows of ' + str(values['row_length']) if values['pack'] else ''}; "
            f"activations kept for {keep} layers, adapters in {layers}"
        )
        self._line(f"  {verdict(e.summary)}")
        if e.resumed_at:
            self._line(f"  going on after step {e.resumed_at}")

    def _answered(self, e: Answered) -> None:
        self._line(f"\n{e.when} training, asked: {e.question}")
        note = f"  [{e.rung}: {e.reason}]" if e.rung else ""
        cut = "  [stopped at max_new_tokens]" if e.finish == "length" else ""
        self._line(f"  answer: {e.answer.strip()}{cut}{note}\n")

    def _stepped(self, e: Stepped) -> None:
        self._steps, self._tokens = self._steps + 1, self._tokens + e.tokens
        self._seconds += e.seconds
        rate = self._tokens / self._seconds
        left = duration((e.steps - e.step) * self._seconds / self._steps)
        text = (
            f"loss {e.loss:.4f}  lr {e.lr:.2e}  {rate:.0f} tokens/s  "
            f"{gib(e.now_bytes)} (peak {gib(e.peak_bytes)})  left {left}"
        )
        if self._console.is_terminal:
            self._live(e, text)
        elif e.step % self._log_every == 0 or e.step == e.steps:
            self._line(f"step {e.step}/{e.steps}  {text}")

    def _live(self, e: Stepped, text: str) -> None:
        if self._progress is None:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(20),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task(text, total=e.steps)
        assert self._task is not None
        self._progress.update(self._task, completed=e.step, description=text)
        if e.step == e.steps:
            self.__exit__()

    def _finished(self, e: Finished) -> None:
        took = duration(time.monotonic() - self._began)  # several processes' time, where there were several
        self._line(f"\nadapter of step {e.from_step}: {e.adapter}   ({took} in all)")
        off = 100 * (e.estimated_bytes - e.peak_bytes) / e.peak_bytes if e.peak_bytes else 0
        self._line(
            f"memory: estimated {gib(e.estimated_bytes)}, measured peak {gib(e.peak_bytes)} ({off:+.0f} %)"
        )


class JsonView:
    """Every event as one JSON line."""

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def hear(self, event: Event) -> None:
        print_json(as_json(event))
