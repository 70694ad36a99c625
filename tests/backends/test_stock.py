"""The same folder in transformers and in mlx-lm, each by its own loader: alike where the folder is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch, transformers and peft")
mx = pytest.importorskip("mlx.core", reason="needs mlx and mlx-lm")

from burnish.backends.mlx import stock as mlx_stock  # noqa: E402
from burnish.backends.mlx.quantize import quantize_folder  # noqa: E402
from burnish.backends.stock import Consumer  # noqa: E402
from burnish.backends.torch import stock as torch_stock  # noqa: E402
from burnish.errors import UserError  # noqa: E402
from burnish.models.mlx_adapter import to_mlx  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

IDS = [5, 60, 7, 200, 33, 5, 5, 90, 11, 4, 250, 17, 3, 99, 140, 8]
MESSAGES = [{"role": "user", "content": "the model answers"}]
# Widest seen between the two over the models below, in float32: 5e-6 nats.
ALIKE = 2e-5
MODELS = [
    ("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen2", False), ("qwen3", True),
]  # fmt: skip


@contextmanager
def opened(library: Any, *args: Any, **how: Any) -> Iterator[Consumer]:
    consumer = library.open_stock(*args, **how)
    try:
        yield consumer
    finally:
        consumer.close()


def both(folder: Path, peft: Path | None = None, mlx: Path | None = None) -> list[np.ndarray]:
    scores = []
    for library, adapter in ((torch_stock, peft), (mlx_stock, mlx)):
        with opened(library, folder, adapter, dtype="float32") as consumer:
            scores.append(consumer.score(IDS))
    return scores


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama", tied=False)


def peft_adapter(folder: Path, out: Path, size: float = 0.3) -> Path:
    """An adapter of all seven projections, drawn wide, saved by PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.normal_(0, size, generator=generator)
    tuned.save_pretrained(str(out))
    return out


# ---- scores


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_both_score_a_folder_alike(family: str, tied: bool, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", family, tied=tied)
    ours, theirs = both(folder)
    assert ours.shape == theirs.shape == (len(IDS) - 1,) and ours.dtype == theirs.dtype == np.float32
    assert (ours < 0).all() and ours.std() > 0.5
    assert np.abs(ours - theirs).max() < ALIKE


def test_the_score_is_the_log_probability_of_each_next_token(llama: Path):
    """By hand, from transformers' logits: which token a number belongs to, and that it is a probability."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0].double().numpy()
    for at, score in enumerate(both(llama)[0]):
        p = np.exp(logits[at]) / np.exp(logits[at]).sum()
        assert abs(np.exp(score) - p[IDS[at + 1]]) < 1e-6


@pytest.mark.parametrize("library", [torch_stock, mlx_stock])
def test_a_long_row_is_scored_in_slices(library: Any, llama: Path, monkeypatch: pytest.MonkeyPatch):
    with opened(library, llama, dtype="float32") as consumer:
        whole = consumer.score(IDS)
        monkeypatch.setattr(library, "_AT_A_TIME", 4)
        assert np.array_equal(consumer.score(IDS), whole)
        assert consumer.score(IDS[:1]).shape == (0,)


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_both_score_an_adapter_alike(family: str, tied: bool, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", family, tied=tied)
    peft = peft_adapter(folder, tmp_path / "peft")
    to_mlx(peft, tmp_path / "mlx", model=folder)
    ours, theirs = both(folder, peft, tmp_path / "mlx")
    assert np.abs(ours - theirs).max() < ALIKE
    assert np.abs(ours - both(folder)[0]).max() > 0.1  # the adapter is on


def test_auto_computes_in_the_dtype_that_is_stored(llama: Path, tmp_path: Path):
    """In bfloat16 the numbers are coarse, and 'float32' computes the same weights wide."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.bfloat16)
    model.save_pretrained(str(tmp_path / "half"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama / file, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    said = config | {"rope_theta": config["rope_parameters"]["rope_theta"]}
    (tmp_path / "half" / "config.json").write_text(json.dumps(said))
    wide = both(tmp_path / "half")
    assert np.abs(wide[0] - wide[1]).max() < ALIKE
    for library in (torch_stock, mlx_stock):
        with opened(library, tmp_path / "half") as consumer:
            assert 1e-4 < np.abs(consumer.score(IDS) - wide[0]).max() < 0.3


# ---- what a user would get


def test_a_rope_base_that_mlx_lm_does_not_read_shows(tmp_path: Path):
    """Without `rope_theta` at the top mlx-lm turns by 10,000, and its score shows it."""
    folder = tiny_model(tmp_path / "model", "llama", tied=False,
                        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0})  # fmt: skip
    right, also = both(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = both(folder)
    assert np.abs(right - also).max() < ALIKE and np.array_equal(ours, right)
    assert np.abs(theirs - right).max() > 1e-2


def test_a_packed_folder_in_mlx_lm(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "llama", tied=False, hidden_size=64, intermediate_size=128)
    quantize_folder(folder, tmp_path / "eight", 8)
    quantize_folder(folder, tmp_path / "four", 4)
    exact = both(folder)[1]
    with opened(mlx_stock, tmp_path / "eight", dtype="float32") as eight:
        near = np.abs(eight.score(IDS) - exact).max()
    with opened(mlx_stock, tmp_path / "four", dtype="float32") as four:
        far = np.abs(four.score(IDS) - exact).max()
    assert 0 < near < 0.2 * far


# ---- answers


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_answer_alike(family: str, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", family)
    answers = []
    for library in (torch_stock, mlx_stock):
        with opened(library, folder, dtype="float32") as consumer:
            answer = consumer.greedy(IDS, 12, [])
            assert len(answer) == 12 and answer[:5] == consumer.greedy(IDS, 5, [])
            stop = answer[4]
            first = answer.index(stop)
            assert consumer.greedy(IDS, 12, [stop]) == answer[:first]  # and the stop is no part of it
            assert consumer.greedy(IDS, 0, []) == []
            # the likeliest at each step, by the score of nothing but this consumer
            for at, token in enumerate(answer[:3]):
                row = [*IDS, *answer[:at]]
                best = consumer.score([*row, token])[-1]
                assert all(consumer.score([*row, other])[-1] <= best for other in range(0, 280, 40))
            answers.append(answer)
    assert answers[0] == answers[1]


def test_settings_of_sampling_in_the_folder_are_not_used(tmp_path: Path):
    """A repetition penalty in generation_config.json, as Qwen2.5 has one, would make the answer another."""
    folder = tiny_model(tmp_path / "model", "llama", tied=False)
    with opened(torch_stock, folder, dtype="float32") as consumer:
        plain = consumer.greedy(IDS, 24, [])
    assert len(set(plain)) < len(plain)  # a penalty would change something
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": plain[2]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with opened(torch_stock, folder, dtype="float32") as consumer:
        assert consumer.greedy(IDS, 24, []) == plain


# ---- tokens


def test_prompt_and_tokens_are_the_tokenizers_own(llama: Path):
    text = "<|im_start|>user\nthe model answers<|im_end|>\n<|im_start|>assistant\n"
    for library in (torch_stock, mlx_stock):
        with opened(library, llama) as consumer:
            prompt = consumer.prompt(MESSAGES)
            assert prompt == consumer.tokens(text) and prompt[0] == 1 and all(type(i) is int for i in prompt)


def with_bos(folder: Path) -> Path:
    """The tokenizer of Llama's kind: it puts a BOS (id 0) before every text by itself."""
    path = folder / "tokenizer.json"
    inner = json.loads(path.read_text())
    bos, a = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    inner["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, a],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(inner))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
    return folder


def test_what_a_program_adds_by_itself(llama: Path, tmp_path: Path):
    """transformers adds a second BOS to a text that has one; mlx-lm's generate does not."""
    folder = with_bos(shutil.copytree(llama, tmp_path / "model"))
    with opened(torch_stock, folder) as ours, opened(mlx_stock, folder) as theirs:
        assert ours.tokens("answer")[0] == theirs.tokens("answer")[0] == 0
        assert ours.tokens("<|endoftext|>answer")[:2] == [0, 0]
        assert theirs.tokens("<|endoftext|>answer") == theirs.tokens("answer")


# ---- what cannot be read


@pytest.mark.parametrize(("library", "name"), [(torch_stock, "transformers"), (mlx_stock, "mlx-lm")])
def test_folders_that_cannot_be_read(library: Any, name: str, llama: Path, tmp_path: Path):
    def refused(folder: Path, says: str, adapter: Path | None = None) -> None:
        with pytest.raises(UserError, match=says):
            library.open_stock(folder, adapter)

    refused(tmp_path / "none", "none holds no config.json")
    refused(llama, "none holds no adapter_config.json", tmp_path / "none")
    folder = shutil.copytree(llama, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{name} cannot load {folder}: ")
    (folder / "model.safetensors").unlink()
    refused(folder, f"{name} cannot load {folder}: ")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    refused(folder, f"{name} cannot load {folder}: ")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(llama, f"cannot load {'.*with the adapter ' if library is mlx_stock else ''}{adapter}", adapter)


def test_weights_that_would_be_drawn_at_random(llama: Path, tmp_path: Path):
    """transformers loads a folder that lacks a matrix, and draws it; mlx-lm refuses by itself."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    for library in (torch_stock, mlx_stock):
        with pytest.raises(UserError, match=name):
            library.open_stock(folder)


@pytest.mark.parametrize("library", [torch_stock, mlx_stock])
def test_a_folder_without_a_chat_template(library: Any, llama: Path, tmp_path: Path):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with opened(library, folder) as consumer, pytest.raises(UserError, match="no prompt of the messages"):
        consumer.prompt(MESSAGES)
