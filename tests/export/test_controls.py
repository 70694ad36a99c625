"""Exports that are broken on purpose, each in a way that programs of today break them: the proof must refuse
every one, say what is wrong, and leave nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.export import targets
from burnish.export.adapter import Adapter, read_adapter
from burnish.export.merged import Merged
from burnish.export.source import Source
from tests.export.broken import fused_into_4bit
from tests.export.world import Tuned, changed, edited, left, needs, refused, roads, trained

MERGED = (("hf", "f32"), ("hf", "bf16"), ("gguf", "q8_0"), ("mlx", "16bit"), ("mlx", "8bit"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(trained(tmp_path_factory.mktemp("llama"), "llama", tied=False))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Trained without a chat template, so prompts are text."""
    return Tuned(trained(tmp_path_factory.mktemp("plain"), "llama", data={"chat_template": "never"}))


# --- the adapter ---


def adapted(patch: pytest.MonkeyPatch, by: Callable[[Adapter], Adapter]) -> None:
    patch.setattr(targets, "Merged", lambda base, folder: Merged(base, by(read_adapter(folder))))


def without_a_layer(adapter: Adapter) -> Adapter:
    kept = {m: ab for m, ab in adapter.modules.items() if ".layers.1." not in m}
    assert 0 < len(kept) < len(adapter.modules)
    return replace(adapter, modules=kept)


def only(*leaves: str) -> Callable[[Adapter], Adapter]:
    return lambda a: replace(a, modules={m: ab for m, ab in a.modules.items() if m.endswith(leaves)})


BROKEN: dict[str, tuple[Callable[[Adapter], Adapter], float, float]] = {  # and what may be left of it
    "left out": (lambda a: a.scaled(0.0), -0.02, 0.02),
    "scale halved": (lambda a: a.scaled(0.5), 0.2, 0.9),
    "a layer left out": (without_a_layer, 0.0, 0.95),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize(("to", "type"), roads(*MERGED))
def test_the_adapter_is_not_all_there(
    to: str, type: str, what: str, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs(to)
    by, low, high = BROKEN[what]
    adapted(monkeypatch, by)
    assert low < left(refused(llama, tmp_path, to, type)) < high


def test_its_projections_of_the_mlp_were_left_out(
    llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapted(monkeypatch, only("q_proj", "k_proj", "v_proj", "o_proj"))
    assert left(refused(llama, tmp_path, "hf", "f32")) < 0.9


def test_it_was_added_twice(llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapted(monkeypatch, lambda a: a.scaled(2.0))
    said = refused(llama, tmp_path, "hf", "f32")
    assert "one token differs by" in said and "on average" in said


@pytest.mark.parametrize(("to", "file"), [("hf", "adapter_config.json"), ("mlx", "adapter_config.json")])
def test_an_adapter_alone_that_says_another_scale(to: str, file: str, llama: Tuned, tmp_path: Path):
    needs(to)

    def halve(folder: Path) -> None:
        said = json.loads((folder / file).read_text())
        if to == "hf":
            edited(folder / file, lora_alpha=said["lora_alpha"] / 2)
        else:
            lora = said["lora_parameters"]
            edited(folder / file, lora_parameters=lora | {"scale": lora["scale"] / 2})

    assert 0.2 < left(refused(llama, tmp_path, to, "adapter", True, write=changed(halve))) < 0.9


@pytest.mark.llama
@pytest.mark.parametrize("heads", [0, 2])
def test_an_adapter_alone_whose_heads_are_not_as_llama_cpp_has_them(
    heads: int, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """q has 4 heads and k 2. Left as they were, or all interleaved as if there were two."""
    needs("gguf")
    from burnish.export import gguf, gguf_tensors

    true = gguf_tensors.interleaved
    monkeypatch.setattr(gguf, "interleaved", lambda b, _: true(b, heads) if heads else b)
    assert "nats on average, more than 0.005" in refused(llama, tmp_path, "gguf", "adapter", True)


@pytest.mark.llama
@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_rows_of_q_and_k_were_not_interleaved(
    to: str, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs(to)
    from burnish.export import gguf_tensors

    monkeypatch.setattr(gguf_tensors, "interleaved", lambda chunk, _: chunk)
    said = refused(llama, tmp_path, to, "q8_0")
    assert "on average, more than 0.05" in said and "nats, more than 2" in said


# --- weights ---


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[..., None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed(spoil)


def test_two_layers_changed_places(llama: Tuned, tmp_path: Path):
    def swap(t: dict[str, np.ndarray]) -> None:
        one, two = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
        t[one], t[two] = t[two], t[one]

    assert "on average" in refused(llama, tmp_path, "hf", "f32", write=weights(swap))


def test_one_number_is_none(llama: Tuned, tmp_path: Path):
    def spoil(t: dict[str, np.ndarray]) -> None:
        t["model.layers.2.self_attn.v_proj.weight"][3, 3] = np.nan

    said = refused(llama, tmp_path, "hf", "f32", write=weights(spoil))
    assert "it scores NaN or infinity" in said


def test_one_row_of_one_matrix_is_off(llama: Tuned, tmp_path: Path):
    """A seam between two chunks: a thousandth of the weights."""

    def spoil(t: dict[str, np.ndarray]) -> None:
        t["model.layers.1.mlp.gate_proj.weight"][64] = 0

    assert "one token differs by" in refused(llama, tmp_path, "hf", "f32", write=weights(spoil))


def test_rounded_more_than_it_says(llama: Tuned, tmp_path: Path):
    """float32 that went through bfloat16 on its way."""

    def spoil(t: dict[str, np.ndarray]) -> None:
        for name, value in t.items():
            t[name] = (value.view(np.uint32) & 0xFFFF0000).view(np.float32)

    said = refused(llama, tmp_path, "hf", "f32", write=weights(spoil))
    assert "on average, more than 0.0002" in said


def test_fused_into_4_bits(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    """The adapter added to weights that are packed already. Wide matrices, as those of real models: there an
    adapter does much with numbers that are small beside the grid. No token is farther off than 4 bits may be;
    only that the adapter is gone tells.
    """
    needs("mlx")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    run = trained(
        tmp_path_factory.mktemp("wide"), "llama", tied=False, sizes=sizes, train={"lr": 0.005}, quiet=2
    )
    wide = Tuned(run)

    def fused(kind: Any, source: Source, folder: Path, type: str) -> None:
        kind.write(source, folder, type)
        shutil.rmtree(folder)
        fused_into_4bit(source.base.folder, source.adapter, folder)
        source.tokenizer.save(folder)

    said = refused(wide, tmp_path, "mlx", "4bit", write=fused)
    good = wide.export(tmp_path / "out", "mlx", "4bit").proof
    assert good is not None and good.survival is not None
    assert left(said) < 0.4 < 0.8 < good.survival and "nats" not in said


# --- what stands beside them ---


def test_transformers_is_told_another_theta(llama: Tuned, tmp_path: Path):
    def spoil(folder: Path) -> None:
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        assert rope["rope_theta"] == 50_000
        edited(folder / "config.json", rope_parameters=rope | {"rope_theta": 10_000.0}, rope_theta=10_000.0)

    said = refused(llama, tmp_path, "hf", "f32", write=changed(spoil))
    assert "on average, more than 0.0002" in said and "one token differs" in said


@pytest.mark.parametrize("type", ["16bit", "8bit"])
def test_theta_is_not_where_mlx_lm_looks_for_it(type: str, llama: Tuned, tmp_path: Path):
    """At the top of config.json: where transformers 5 writes it alone, mlx-lm takes 10,000 without a word."""
    needs("mlx")

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("rope_theta") == 50_000
        (folder / "config.json").write_text(json.dumps(config))

    assert "on average" in refused(llama, tmp_path, "mlx", type, write=changed(spoil))


@pytest.mark.parametrize(
    ("to", "type", "program"), [("hf", "f32", "transformers"), ("mlx", "16bit", "mlx-lm")]
)
def test_one_merge_of_the_tokenizer_is_lost(to: str, type: str, program: str, llama: Tuned, tmp_path: Path):
    needs(to)
    said = refused(llama, tmp_path, to, type, write=changed(without_a_merge))
    assert re.fullmatch(rf"{program} \S+ reads 100% of the prompts as other tokens\.", said)


@pytest.mark.llama
def test_one_merge_is_lost_for_llama_cpp(llama: Tuned, tmp_path: Path):
    needs("gguf")
    said = refused(llama, tmp_path, "gguf", "q8_0", write=with_source(without_a_merge))
    assert re.fullmatch(r"llama-cpp-python \S+ reads 100% of the prompts as other tokens\.", said)


def without_a_merge(folder: Path) -> None:
    """The last one of 'question', which is in every prompt."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    used = next(i for i, m in enumerate(merges) if m.replace(" ", "") in ("question", "qu", "es"))
    del said["model"]["merges"][used]
    path.write_text(json.dumps(said))


def with_source(change: Callable[[Path], object]) -> Callable[..., None]:
    """A GGUF file holds the tokenizer in its own form: it is written from one that is spoilt."""

    def write(kind: Any, source: Source, folder: Path, type: str) -> None:
        with tempfile.TemporaryDirectory() as place:
            spoilt = shutil.copytree(source.adapter, Path(place) / "adapter")
            change(spoilt)
            kind.write(replace(source, adapter=spoilt), folder, type)

    return write


def test_the_end_of_a_turn_is_no_special_token_any_more(llama: Tuned, tmp_path: Path):
    """It is spelt out then, in the prompt and where the answer should end."""

    def spoil(folder: Path) -> None:
        said = json.loads((folder / "tokenizer.json").read_text())
        kept = [t for t in said["added_tokens"] if t["content"] != "<|im_end|>"]
        assert len(kept) < len(said["added_tokens"])
        edited(folder / "tokenizer.json", added_tokens=kept)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for key in [k for k, v in config.items() if v == "<|im_end|>"]:
            del config[key]
        config.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    said = refused(llama, tmp_path, "hf", "f32", write=changed(spoil))
    assert "reads 100% of the prompts as other tokens" in said


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_a_token_is_put_before_every_text(to: str, plain: Tuned, tmp_path: Path):
    """A beginning-of-sequence that training did not have."""
    needs(to)

    def spoil(folder: Path) -> None:
        begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
        post = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text]}
        edited(folder / "tokenizer.json", post_processor={**post, "special_tokens": tokens})

    type = {"hf": "f32", "mlx": "16bit"}[to]
    assert "reads 100% of the prompts" in refused(plain, tmp_path, to, type, write=changed(spoil))


def test_transformers_is_told_another_end(llama: Tuned, tmp_path: Path):
    """`generate` would go on past the answer."""

    def spoil(folder: Path) -> None:
        said = json.loads((folder / "generation_config.json").read_text())
        assert said["eos_token_id"] == 2
        edited(folder / "generation_config.json", eos_token_id=0)

    assert "does not end an answer" in refused(llama, tmp_path, "hf", "f32", write=changed(spoil))


OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.mark.parametrize("other", [OTHER, None])
@pytest.mark.parametrize(("to", "type"), [("hf", "f32"), ("mlx", "8bit")])
def test_another_chat_template_or_none(to: str, type: str, other: str | None, llama: Tuned, tmp_path: Path):
    needs(to)

    def spoil(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        assert "<|im_start|>" in path.read_text()
        path.write_text(other) if other else path.unlink()

    said = refused(llama, tmp_path, to, type, write=changed(spoil))
    assert re.fullmatch(r"\S+ \S+ reads 100% of the prompts as other tokens\.", said)


@pytest.mark.llama
def test_another_chat_template_for_llama_cpp(llama: Tuned, tmp_path: Path):
    needs("gguf")

    def write(kind: Any, source: Source, folder: Path, type: str) -> None:
        kind.write(replace(source, tokenizer=source.tokenizer.with_template(OTHER)), folder, type)

    said = refused(llama, tmp_path, "gguf", "q8_0", write=write)
    assert "reads 100% of the prompts as other tokens" in said


@pytest.mark.llama
@pytest.mark.parametrize(("was", "now"), [("<|im_start|>assistant\n", "assistant: "), ("<|im_end|>\n", "\n")])
def test_another_template_in_the_modelfile(was: str, now: str, llama: Tuned, tmp_path: Path):
    """llama.cpp reads the file rightly; Ollama would make another prompt of the messages."""
    needs("ollama")

    def spoil(folder: Path) -> None:
        text = (folder / "Modelfile").read_text()
        assert was in text
        (folder / "Modelfile").write_text(text.replace(was, now))

    said = refused(llama, tmp_path, "ollama", "q8_0", write=changed(spoil))
    assert re.fullmatch(r"llama-cpp-python \S+ reads 100% of the prompts as other tokens\.", said)


# --- what cannot be read at all ---


@pytest.mark.parametrize(
    ("to", "type", "file"),
    roads(("hf", "f32", "*.safetensors"), ("mlx", "16bit", "*.safetensors"), ("gguf", "q8_0", "*.gguf")),
)
def test_cut_short(to: str, type: str, file: str, llama: Tuned, tmp_path: Path):
    needs(to)

    def spoil(folder: Path) -> None:
        (path,) = folder.glob(file)
        path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(UserError, match=r"cannot load|does not load"):
        llama.export(tmp_path / "out", to, type, write=changed(spoil))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_missing(llama: Tuned, tmp_path: Path):
    """transformers would draw it at random, and warn."""
    lost = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(UserError, match=rf"lacks weights(.|\n)*{lost}"):
        llama.export(tmp_path / "out", "hf", "f32", write=weights(lambda t: t.pop(lost)))
    assert list(tmp_path.iterdir()) == []


# --- none of this is refused unspoilt ---


@pytest.mark.parametrize(("to", "type"), roads(*MERGED, ("ollama", "q8_0")))
def test_unspoilt_they_pass(to: str, type: str, llama: Tuned, plain: Tuned, tmp_path: Path):
    needs(to)
    for name, tuned in (("chat", llama), ("plain", plain)):
        if (to, name) == ("ollama", "plain"):
            continue  # prompts without roles have no Modelfile
        done = tuned.export(tmp_path / name, to, type)
        assert done.proof is not None and done.proof.passed


@pytest.mark.parametrize(("to", "type"), roads(("hf", "bf16"), ("gguf", "q8_0")))
def test_a_faint_adapter_passes_too(
    to: str, type: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    """A short run at a small rate: it moves a token by 0.01 nats, and rounding the base as much or more."""
    needs(to)
    run = trained(tmp_path_factory.mktemp("faint"), "llama", tied=False, train={"lr": 1e-4})
    assert Tuned(run).export(tmp_path / "out", to, type).proof
