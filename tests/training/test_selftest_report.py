"""The selftest's report: what is tested where, what is said of it, and that nothing of its owner is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.machine.probe import Machine
from burnish.training.selftest import run
from burnish.training.selftest.checks import CHECKS
from burnish.training.selftest.report import AVOID, MEMORY, TRUTH, Line, Report, advice, facts, scrubbed
from burnish.training.selftest.run import Target, targets_of
from burnish.training.selftest.world import CPU, GPU
from tests.tiny import MACHINE
from tests.training.selftest_world import MLX, TINY, TORCH, machine


@pytest.mark.parametrize(
    ("here", "backend", "device", "expected", "truth"),
    [
        (machine("metal", **TORCH, **MLX), "auto", "auto", ["torch on mps", "mlx on metal"], "torch on cpu"),
        (machine("metal", **MLX), "auto", "auto", ["mlx on metal"], "mlx on cpu"),
        (machine("metal", **TORCH, **MLX), "mlx", "auto", ["mlx on metal"], "torch on cpu"),
        (machine("metal", **TORCH, **MLX), "auto", "mps", ["torch on mps", "mlx on metal"], "torch on cpu"),
        (machine("metal", **TORCH, **MLX), "torch", "metal", ["torch on mps"], "torch on cpu"),
        (machine("metal", **TORCH, **MLX), "auto", "cpu", ["torch on cpu", "mlx on cpu"], "reference on cpu"),
        (machine("cuda", **TORCH, **MLX), "auto", "auto", ["torch on cuda"], "torch on cpu"),
        (machine("cuda", **TORCH, **MLX), "mlx", "auto", ["mlx on cpu"], "reference on cpu"),
        (machine("", **TORCH, **MLX), "auto", "auto", ["torch on cpu", "mlx on cpu"], "reference on cpu"),
        (machine("", mlx="0.32.4", **TORCH), "auto", "auto", ["torch on cpu"], "reference on cpu"),
    ],
)
def test_targets(here: Machine, backend: str, device: str, expected: list[str], truth: str) -> None:
    found = targets_of(here, backend, device)
    assert [str(t) for t in found] == expected
    assert str(run._truth_of(here, found)) == truth


def test_targets_of_mlx_on_cuda() -> None:
    here = machine("cuda", **TORCH, **MLX, **{"mlx-cuda-13": "0.32.4"})
    assert targets_of(here, "auto", "auto") == [Target("torch", "cuda"), Target("mlx", "cuda")]


def test_what_is_not_here_is_refused() -> None:
    for asked in (("mlx", "auto"), ("auto", "cuda"), ("torch", "mps")):
        with pytest.raises(UserError, match="is not on this machine; there is: torch on cpu"):
            targets_of(machine("", **TORCH), *asked)
    with pytest.raises(UserError, match="neither torch nor mlx"):
        targets_of(machine(), "auto", "auto")


# --- the report ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OSError: /Users/anna/Library/x/model.safetensors: gone", "OSError: …/model.safetensors: gone"),
        ("in '/private/var/folders/q1/T/burnish-selftest-x/model'", "in '…/model'"),
        ("at C:\\Users\\anna\\x.py, line 3", "at …/x.py, line 3"),
        ("see ~/models/a", "see …/a"),
        ("two\n  lines", "two lines"),
        ("7.5e-3 of 1/2 tokens/s", "7.5e-3 of 1/2 tokens/s"),
        ("'mps.add' op requires the same element type", "'mps.add' op requires the same element type"),
    ],
)
def test_no_path_is_in_a_report(text: str, expected: str) -> None:
    assert scrubbed(text) == expected


def test_folders_with_spaces_are_cut_out_too() -> None:
    assert "Anna" not in scrubbed("cannot open /Users/Anna B/tmp/x", [Path("/Users/Anna B")])


def line(check: str, where: str, status: str, dtype: str = "", what: str = "") -> Line:
    return Line(check, where, what, status, dtype=dtype)  # type: ignore[arg-type]


LOSS, MPS, METAL = "loss and gradients", "torch on mps", "mlx on metal"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line(LOSS, MPS, "failed", "float32")], "device=cpu"),
        ([line(LOSS, MPS, "failed", "float32"), line(LOSS, METAL, "passed")], "backend=mlx or device=cpu"),
        ([line(LOSS, MPS, "failed", "float32"), line(LOSS, METAL, "failed")], "device=cpu"),
        ([line(LOSS, MPS, "failed", "bfloat16"), line(LOSS, MPS, "passed", "float32")], "dtype=float32"),
        ([line(LOSS, MPS, "failed", "bfloat16"), line(LOSS, MPS, "failed", "float32")], "device=cpu"),
        ([line("packing", MPS, "failed")], "train.pack=false"),
        ([line("dropout", METAL, "failed")], "lora.dropout=0"),
        ([line(LOSS, "torch on cpu", "failed")], "no way around it is known here"),
        ([line(LOSS, "torch on cpu", "failed"), line(LOSS, "mlx on cpu", "passed")], "backend=mlx"),
        ([line(TRUTH, "torch on cpu", "failed")], "the CPU itself fails: burnish doctor"),
    ],
)
def test_what_to_set_until_it_is_mended(lines: list[Line], expected: str) -> None:
    assert advice(lines[0], lines) == expected


def test_every_check_has_a_way_around_it() -> None:
    """Their keys are a recipe's."""
    from burnish.recipe import known_keys

    assert set(AVOID) == set(CHECKS) - {TRUTH}
    for ways in AVOID.values():
        for word in ways.split():
            if "=" in word or "." in word:
                assert word.partition("=")[0] in known_keys()


def report(*lines: Line) -> Report:
    return Report(facts(MACHINE), "torch on cpu, float32", lines, 1.0, False)


def test_closing_sentences() -> None:
    good, memory = line(LOSS, MPS, "passed"), line(MEMORY, MPS, "passed")
    assert report(good, memory, memory).closing == (
        "all 3 checks passed: what burnish computes here is what it computes on the CPU. "
        "2 of them are predictions confirmed (memory)."
    )
    told = line("speed", MPS, "told")
    broken = report(good, told, line("packing", MPS, "failed"), line("packing", MPS, "failed"))
    assert not broken.right
    assert broken.closing == (
        "2 of 3 checks failed. Until it is mended: packing on torch on mps: train.pack=false. "
        "Please share this report."
    )
    assert not report().right and not report(told).right, "nothing was checked"


def test_lines_and_head_are_for_people() -> None:
    said = Line(MEMORY, MPS, "most memory of a step", "passed", 200 << 20, 624 << 20, "bytes", "x").text
    assert said == "✓ torch on mps: most memory of a step: 200 MiB (limit 624 MiB) – x"
    assert (
        Line("packing", MPS, "p", "failed", 0.00123, 1e-4).text == "✗ torch on mps: p: 0.0012 (limit 0.0001)"
    )
    assert Line("resume", MPS, "n", "passed", 0, 0).text == "✓ torch on mps: n: 0 (limit 0)"
    rosetta = replace(MACHINE, system="Darwin", release="15.6", arch="arm64", python_arch="x86_64")
    head = Report(facts(rosetta), "torch on cpu", (), 0.0, True).head
    assert head[0].endswith("selftest, quick")
    assert head[2] == "macOS 15.6, arm64 (Python: x86_64), Python 3.11.0"


def test_sizes_can_be_packed_and_cross_what_they_should() -> None:
    for size in (CPU, GPU, TINY):
        assert all(n % 64 == 0 for n in (size.hidden, size.intermediate))
        assert size.long - 1 > 2 * 64, "several blocks of queries on a CPU"
        assert max(size.rows) < size.long
