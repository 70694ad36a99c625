"""What both sides of a proof are asked: enough of it, and the very prompts that are exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from burnish.errors import UserError
from burnish.export import job, live, questions
from burnish.export.adapter import read_adapter
from burnish.export.questions import Questions, ask_about
from burnish.export.source import open_source
from tests.export.world import Tuned, changed, edited, refused, roads, rows, trained

BROKEN = '{{ "broken" }}'


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(trained(tmp_path_factory.mktemp("llama"), "llama", tied=False))


def with_rows(tuned: Tuned, path: Path, found: list[dict[str, str]]) -> Tuned:
    """The same run, validated on other rows: all of its data, so that no other prompt is there."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    source = open_source(tuned.folder, None, [f"data.valid={path}", f"data.train={path}"])
    other = Tuned(tuned.folder)
    other.__dict__["source"] = source  # a cached property of a frozen class
    return other


def test_training_rows_join_where_validation_rows_are_few(llama: Tuned):
    asked = ask_about(llama.source)
    assert asked.origin == "validation rows and training rows"
    assert asked.n_targets >= questions.TARGETS and len(asked.rows) > 12


def test_training_rows_are_left_alone_where_there_are_enough(llama: Tuned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(questions, "TARGETS", 50)
    asked = ask_about(llama.source)
    assert asked.origin == "validation rows" and len(asked.rows) == questions.ROWS
    assert 50 <= asked.n_targets < 300


def test_long_rows_wait_for_short_ones_and_a_single_long_one_is_cut(
    llama: Tuned, monkeypatch: pytest.MonkeyPatch
):
    whole = ask_about(llama.source)
    lengths = sorted(map(len, whole.rows))
    monkeypatch.setattr(questions, "LONGEST", lengths[3])
    assert max(map(len, ask_about(llama.source).rows)) <= lengths[3]
    monkeypatch.setattr(questions, "LONGEST", lengths[0] - 1)
    cut = ask_about(llama.source)
    assert {len(row) for row in cut.rows} == {lengths[0] - 1}
    assert all(max(at) < lengths[0] - 1 for at in cut.targets)


def test_they_come_back_from_a_file(llama: Tuned, tmp_path: Path):
    asked = ask_about(llama.source)
    asked.save(tmp_path / "q.json")
    assert Questions.load(tmp_path / "q.json") == asked
    assert asked.ends == (llama.source.tokenizer.special["<|im_end|>"],)


@pytest.mark.parametrize(("to", "type", "alone"), roads(("hf", "f32", False), ("gguf", "adapter", True)))
def test_prompts_of_the_proofs_own_where_no_row_has_one(
    to: str, type: str, alone: bool, llama: Tuned, tmp_path: Path
):
    """Rows with special tokens in a text are no prompts that each program makes alike, and no reason to leave
    the chat template unproven.
    """
    special = [{**row, "prompt": f"{row['prompt']} <|im_end|>"} for row in rows(16)]
    odd = with_rows(llama, tmp_path / "odd.jsonl", special)
    assert [a.messages[-1]["content"] for a in ask_about(odd.source).asked] == list(questions._SPARE)
    (tmp_path / "outs").mkdir()
    if to == "hf":
        spoil = changed(lambda folder: (folder / "chat_template.jinja").write_text(BROKEN))
        assert "reads 100% of the prompts" in refused(odd, tmp_path / "outs", to, type, alone, write=spoil)
    done = odd.export(tmp_path / "outs" / "out", to, type, alone)
    assert done.proof is not None and done.proof.greedy_prompts == 2


def test_the_tokenizer_beside_an_adapter_is_the_one_that_is_read(llama: Tuned, tmp_path: Path):
    spoil = changed(lambda folder: (folder / "chat_template.jinja").write_text(BROKEN))
    assert "reads 100% of the prompts" in refused(llama, tmp_path, "hf", "adapter", True, write=spoil)


def test_rows_that_the_stored_template_does_not_render(llama: Tuned, tmp_path: Path):
    """They would silently be rendered by another one, and what is exported never be asked. This one cuts
    reasoning, as R1's does: the rows of training had none.
    """
    run = shutil.copytree(llama.folder, tmp_path / "run")
    path = run / "adapter" / "chat_template.jinja"
    text = re.sub(r"(m\w*(?:\['content'\]|\.content))", r"\1.split('</think>')[-1]", path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    assert ask_about(open_source(run, None, [])).asked == ask_about(llama.source).asked
    thinks = [{**row, "completion": f"<think>\n1 2 3\n</think>\n\n{row['completion']}"} for row in rows(16)]
    (tmp_path / "think.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thinks))
    with pytest.raises(UserError, match="the chat template there does not render this data"):
        ask_about(open_source(run, None, [f"data.valid={tmp_path / 'think.jsonl'}"]))


def test_a_model_that_is_held_in_16_bits_is_proven_too(
    llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where float32 does not fit. Good exports pass; one without the adapter does not."""
    fits = live.make_plan

    def narrow(recipe: object, *rest: object) -> object:
        return fits(recipe.model_copy(update={"dtype": "bfloat16"}), *rest)  # type: ignore[attr-defined]

    monkeypatch.setattr(live, "make_plan", narrow)
    half = Tuned(llama.folder)
    assert half.live.dtype == "bfloat16"
    for to, type, alone in (("hf", "f32", False), ("hf", "bf16", False), ("hf", "adapter", True)):
        done = half.export(tmp_path / "-".join((to, type)), to, type, alone)
        assert done.proof is not None and done.proof.live_dtype == "bfloat16" == done.proof.dtype
    none = read_adapter(half.source.adapter).scaled(0.0)
    monkeypatch.setattr("burnish.export.targets.Merged", lambda base, _: job.Merged(base, none))
    (tmp_path / "outs").mkdir()
    assert "of the adapter's effect is left" in refused(half, tmp_path / "outs", "hf", "f32")


def test_the_proof_is_not_planned_as_a_training(llama: Tuned):
    """One row forward: however many rows a step of training had."""
    recipe = llama.source.recipe
    big = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 512})})
    assert live.live_plan(big, llama.source.base).micro_batch.value == 1


def test_an_adapter_made_elsewhere(llama: Tuned, tmp_path: Path):
    """No recipe says how long its rows were; its base may have no name."""
    adapter = shutil.copytree(llama.folder / "adapter", tmp_path / "adapter")
    for name in ("recipe.yaml", "burnish.json"):
        (adapter / name).unlink()
    data = [f"data.train={llama.folder.parent / 'train.jsonl'}"]
    asked = ask_about(open_source(adapter, None, data))
    assert asked.n_targets >= questions.TARGETS and np.median([len(row) for row in asked.rows]) > 20
    edited(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no model"):
        open_source(adapter, None, data)
    edited(adapter / "adapter_config.json", r="x")
    with pytest.raises(UserError, match="r and lora_alpha: expected numbers"):
        open_source(adapter, llama.source.base.folder, data)
