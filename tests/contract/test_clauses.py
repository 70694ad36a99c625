"""The contract on every backend, and on doubles that break it: one that passes its double checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract import clauses, doubles
from tests.contract.clauses import Make

Check = Callable[[Make, Path], None]

CONTROLS: dict[Check, tuple[type[doubles.Wrapped], ...]] = {
    clauses.check_1_types: (doubles.WiderScores, doubles.ArrayScalars),
    clauses.check_2_atomic: (doubles.UpdatesBeforeChecking, doubles.LosesItsPlaceInTheMasks),
    clauses.check_2_rehearsal: (
        doubles.RehearsalIsAStep, doubles.RehearsalTakesAMask, doubles.RehearsesForwardOnly,
    ),
    clauses.check_2_reshape: (doubles.ReshapingForgets, doubles.ReshapingDoesNothing),
    clauses.check_3_split: (doubles.MeanOfMeans, doubles.SumNotMean),
    clauses.check_4_errors: (doubles.NaNsPassThrough, doubles.NoTokensNoError, doubles.LoadsHalf),
    clauses.check_5_optimizer_from_open_on: (doubles.OptimizerComesLater,),
    clauses.check_6_resume: (doubles.ForgetsMoments, doubles.ResumesAtStepZero, doubles.RunningMasks),
    clauses.check_7_dropout_recomputed: (doubles.RunningMasks, doubles.DropoutDoesNothing),
    clauses.check_7_masks_are_new: (doubles.OneMaskForAllSteps, doubles.OneMaskForAllMicros),
    clauses.check_8_generate: (
        doubles.PadsPrompts, doubles.RowAfterRow, doubles.LogprobsAfterTemperature, doubles.OneStream,
    ),
    clauses.check_8_closing_frees: (doubles.KeepsCaches,),
    clauses.check_9_peft_folder: (doubles.WrongAlpha, doubles.RsloraUntold, doubles.OwnNames),
    clauses.check_packing: (doubles.Leaks,),
}


def name(value: object) -> str:
    return value.__name__ if isinstance(value, type) or callable(value) else str(value)


@pytest.mark.parametrize("check", CONTROLS, ids=name)
def test_clause(check: Check, make: Make, tmp_path: Path) -> None:
    check(make, tmp_path)


@pytest.mark.parametrize(("check", "double"), [(c, d) for c, ds in CONTROLS.items() for d in ds], ids=name)
def test_control(check: Check, double: type[doubles.Wrapped], make_reference: Make, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(doubles.broken(make_reference, double), tmp_path)


def test_a_double_that_breaks_nothing_passes(make_reference: Make, tmp_path: Path) -> None:
    """Else the controls might fail for being wrapped."""
    for check in CONTROLS:
        folder = tmp_path / name(check)
        folder.mkdir()
        check(doubles.broken(make_reference, doubles.Wrapped), folder)
