"""Faulty inputs through the command line: each is answered with a sentence that says what was got and what
was expected, a next step, and an exit code; never with a traceback, and nothing half-written stays behind.

A case is a function that spoils a good world and gives the command to run. `test_runs_gone_wrong.py` has the
faults of runs that have begun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_WILL_NOT_FIT
from tests.tiny import tiny_model
from tests.world import PAIRS, World

TRAIN = ["train", "recipe.yaml", "--out", "out"]


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Callable[[World], list[str]]
    says: tuple[str, ...]
    code: int


CASES: list[Case] = []
Spoil = Callable[[World], list[str]]


def bad(*says: str, code: int = EXIT_BAD_INPUT) -> Callable[[Spoil], Spoil]:
    """The case below, what its error must say (the last is from the next step), and its exit code."""

    def add(spoil: Spoil) -> Spoil:
        CASES.append(Case(spoil.__name__, spoil, says, code))
        return spoil

    return add


# --- recipes ---


@bad("there is no recipe file nope.yaml", "→ burnish recipes")
def recipe_missing(w: World) -> list[str]:
    return ["train", "nope.yaml"]


@bad("no shipped recipe of that name", "→ burnish recipes demo")
def recipe_name_misspelt(w: World) -> list[str]:
    return ["plan", "deno"]


@bad("recipe.yaml:2: this is not YAML", "→")
def recipe_not_yaml(w: World) -> list[str]:
    w.write("recipe.yaml", "model: m\n  train: {\n")
    return TRAIN


@bad("recipe.yaml:1: expected sections such as `model:`", "got list", "→")
def recipe_a_list(w: World) -> list[str]:
    w.write("recipe.yaml", "- model\n- data\n")
    return TRAIN


@bad("recipe.yaml: cannot be read as UTF-8 text", "→")
def recipe_not_utf8(w: World) -> list[str]:
    w.write("recipe.yaml", "name: 医疗\n".encode("gb18030"))
    return TRAIN


@bad("recipe.yaml:3: train.lrr is not a recipe key; did you mean train.lr?", "→ burnish recipes --schema")
def recipe_unknown_key(w: World) -> list[str]:
    w.write("recipe.yaml", "model: m\ntrain:\n  lrr: 1e-4\n")
    return TRAIN


@bad(
    "2 problems", "recipe.yaml:3: train.epochs: expected a valid integer", "got 'many'", "train.lr",
    "→ burnish recipes --schema",
)  # fmt: skip
def recipe_wrong_types(w: World) -> list[str]:
    w.write("recipe.yaml", "model: m\ntrain:\n  epochs: many\n  lr: -1\n")
    return TRAIN


@bad("override 'train.lr': expected section.key=value", "→")
def override_without_value(w: World) -> list[str]:
    return [*TRAIN, "train.lr"]


@bad("override train.lr=fast: train.lr: expected a valid number", "got 'fast'", "→")
def override_wrong_type(w: World) -> list[str]:
    return [*TRAIN, "train.lr=fast"]


@bad("the recipe names no model", "→ set model=FOLDER")
def no_model_named(w: World) -> list[str]:
    return [*TRAIN, "model="]


@bad("the recipe names no training data", "→ set data.train=FILE")
def no_data_named(w: World) -> list[str]:
    return [*TRAIN, "data.train="]


# --- data files ---


@bad("data file", "missing.jsonl does not exist", "→ in ", "data.jsonl")
def data_missing(w: World) -> list[str]:
    return [*TRAIN, "data.train=missing.jsonl"]


@bad("data file", "/nowhere/d.jsonl does not exist", "→ there is no folder", "/nowhere")
def data_folder_missing(w: World) -> list[str]:
    return [*TRAIN, "data.train=nowhere/d.jsonl"]


@bad("HOME/gone/d.jsonl does not exist", "→ there is no folder", "HOME/gone")
def data_missing_at_home(w: World) -> list[str]:
    return [*TRAIN, "data.train=~/gone/d.jsonl"]


@bad("~nobody-of-that-name", "no such user", "→")
def data_of_no_user(w: World) -> list[str]:
    return [*TRAIN, "data.train=~nobody-of-that-name/d.jsonl"]


@bad("is a folder; expected a file of rows", "→ name the file inside it")
def data_a_folder(w: World) -> list[str]:
    (w.root / "rows").mkdir()
    return [*TRAIN, "data.train=rows"]


@bad("data.jsonl/inner.jsonl cannot be read", "→")
def data_inside_a_file(w: World) -> list[str]:
    return [*TRAIN, "data.train=data.jsonl/inner.jsonl"]


@bad("data.jsonl is empty", "→ expected rows as JSON, JSON Lines, CSV")
def data_empty(w: World) -> list[str]:
    w.write("data.jsonl", " \n\n")
    return TRAIN


@bad("data.jsonl holds no rows (it was read as JSON array)", "→ expected rows as JSON")
def data_empty_array(w: World) -> list[str]:
    w.write("data.jsonl", "[]\n")
    return TRAIN


@bad("1 of 4 rows cannot be used", "data.jsonl:3: not JSON: Expecting ',' delimiter", "→ correct or remove")
def data_broken_line(w: World) -> list[str]:
    good = json.dumps(PAIRS[0])
    w.write("data.jsonl", f'{good}\n{good}\n{{"prompt": "a" "completion": "b"}}\n{good}\n')
    return TRAIN


@bad("data.jsonl:5: not JSON: Expecting ':' delimiter", "→ correct or remove")
def data_broken_inside_array(w: World) -> list[str]:
    w.write("data.jsonl", '[\n{"prompt": "a", "completion": "b"},\n{\n "prompt": "c",\n "completion" "d"\n}]')
    return TRAIN


@bad("data.jsonl:2: not JSON: expected ',' or ']' after an item, got the end of the file", "→")
def data_array_cut_off(w: World) -> list[str]:
    w.write("data.jsonl", '[{"prompt": "a", "completion": "b"},\n{"prompt": "c", "completion": "d"}')
    return TRAIN


@bad("2 of 2 rows cannot be used", "data.jsonl:1: expected an object {…}, got an array", "→")
def data_two_arrays(w: World) -> list[str]:
    array = '[{"prompt": "a", "completion": "b"}]'
    w.write("data.jsonl", f"{array}\n{array}\n")
    return TRAIN


@bad(
    "2 of 3 rows cannot be used", "data.jsonl:1: expected an object {…}, got a string",
    "data.jsonl:3: expected an object {…}, got an array", "→ correct or remove",
)  # fmt: skip
def data_rows_no_objects(w: World) -> list[str]:
    w.rows(["a", PAIRS[0], [1]])
    return TRAIN


@bad(
    "data.jsonl:4: expected an object {…}, got a number",
    "data.jsonl:6: expected an object",
    "null",
    "→ correct",
)
def data_array_items_no_objects(w: World) -> list[str]:
    w.write(
        "data.jsonl",
        '[{"prompt": "a",\n "completion": "b"},\n\n 5, {"prompt": "c",\n "completion": "d"},\n null]',
    )
    return TRAIN


@bad("data.jsonl:1: not JSON: nested too deeply", "→")
def data_nested_too_deeply(w: World) -> list[str]:
    w.write("data.jsonl", '{"prompt": ' + "[" * 100_000 + "\n")
    return TRAIN


@bad("data.jsonl:2: not UTF-8 text (byte 0xc1)", "→ iconv -f gb18030 -t utf-8")
def data_in_gbk(w: World) -> list[str]:
    w.write("data.jsonl", (json.dumps(PAIRS[0]) + '\n{"prompt": "医疗", "completion": "a"}\n').encode("gbk"))
    return TRAIN


# --- rows ---


@bad(
    "the columns are Frage, Antwort; expected `messages`, `prompt` and `completion`, or `text`",
    "→ or say in the recipe how to read them, such as data.prompt='Q: {Frage}' data.completion='{Antwort}'",
)
def rows_wrong_columns(w: World) -> list[str]:
    w.rows([{"Frage": "a", "Antwort": "b"}] * 3)
    return TRAIN


@bad(
    "data.prompt names {Qestion}, which is no column of", "did you mean {Question}?",
    "→ its columns are Question, Answer",
)  # fmt: skip
def rows_template_names_no_column(w: World) -> list[str]:
    w.rows([{"Question": "a", "Answer": "b"}] * 3)
    return [*TRAIN, "data.prompt={Qestion}", "data.completion={Answer}"]


@bad("1 of 3 rows cannot be used", "data.jsonl:2: column `Answer` is missing", "→ correct or remove")
def rows_one_lacks_a_column(w: World) -> list[str]:
    w.rows([{"Question": "a", "Answer": "b"}, {"Question": "a"}, {"Question": "a", "Answer": "b"}])
    return [*TRAIN, "data.prompt={Question}", "data.completion={Answer}"]


@bad("data.jsonl:2: column `Answer` holds ['b'], expected text", "→ correct or remove")
def rows_column_holds_a_list(w: World) -> list[str]:
    w.rows([{"Question": "a", "Answer": "b"}, {"Question": "a", "Answer": ["b"]}])
    return [*TRAIN, "data.prompt={Question}", "data.completion={Answer}"]


@bad(
    "2 of 3 rows cannot be used", "data.jsonl:1: the completion is empty",
    "data.jsonl:3: `completion` is null, expected text", "→ correct or remove",
)  # fmt: skip
def rows_empty_completion(w: World) -> list[str]:
    w.rows([{"prompt": "a", "completion": " \n"}, PAIRS[0], {"prompt": "a", "completion": None}])
    return TRAIN


@bad("data.jsonl:2: `text` does not contain '\\nA:' (data.answer_after)", "→ correct or remove")
def rows_text_without_the_answer_mark(w: World) -> list[str]:
    w.rows([{"text": "Q: a\nA: b"}, {"text": "Q: a\nB: b"}])
    return [*TRAIN, 'data.answer_after="\\nA:"']


@bad("data.jsonl:1: half a character (\\ud83d)", "expected whole Unicode text", "→ correct or remove")
def rows_half_a_character(w: World) -> list[str]:
    w.write("data.jsonl", '{"prompt": "a", "completion": "smile \\ud83d"}\n')
    return TRAIN


def _chat(*turns: object) -> dict[str, object]:
    return {"messages": [{"role": t[0], "content": t[1]} if isinstance(t, tuple) else t for t in turns]}


@bad(
    "4 of 5 rows cannot be used",
    "data.jsonl:2: message 1 has role 'human'; expected one of system, user, assistant",
    "data.jsonl:3: message 2 (assistant) has no text in `content`",
    "data.jsonl:4: the last message is the user's; expected the assistant's answer",
    "data.jsonl:5: `messages` is not a list of {role, content}",
    "→ correct or remove",
)
def rows_messages_of_every_wrong_kind(w: World) -> list[str]:
    w.rows([
        _chat(("user", "a"), ("assistant", "b")),
        _chat(("human", "a"), ("gpt", "b")),
        _chat(("user", "a"), {"role": "assistant"}),
        _chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        {"messages": "hello"},
    ])  # fmt: skip
    return TRAIN


@bad("`messages`, which need a chat template; this model's tokenizer has none", "→ use an instruct model")
def rows_messages_without_a_chat_template(w: World) -> list[str]:
    (w.copied_model() / "chat_template.jinja").unlink()
    w.rows([_chat(("user", "a"), ("assistant", "b"))])
    return TRAIN


@bad(
    "1 of 13 rows are longer than train.max_length=64 tokens:", "data.jsonl:13:", "of them before the answer",
    "→ raise train.max_length, or choose data.too_long=drop",
)  # fmt: skip
def rows_too_long(w: World) -> list[str]:
    w.rows([*PAIRS, {"prompt": "why? " * 60, "completion": "b"}])
    return TRAIN


@bad("none of its 12 rows leaves a token to train (12 longer than train.max_length=8)", "→ burnish data")
def rows_all_dropped(w: World) -> list[str]:
    return [*TRAIN, "data.too_long=drop", "train.max_length=8"]


@bad("none of its 1 rows leaves a token to train", "→ burnish data")
def rows_cut_before_the_answer(w: World) -> list[str]:
    w.rows([{"prompt": "why? " * 60, "completion": "b"}])
    return [*TRAIN, "data.too_long=truncate"]


@bad("data.valid_share=0.5 of 1 row leaves nothing to train", "→ set data.valid_share=0")
def rows_all_held_out(w: World) -> list[str]:
    w.rows(PAIRS[:1])
    return [*TRAIN, "data.valid_share=0.5"]


@bad("train.early_stop: 2, but there are no validation rows", "→ set data.valid")
def early_stop_without_validation(w: World) -> list[str]:
    return [*TRAIN, "train.early_stop=2"]


@bad("evaluate.task: exact-match, but there are no validation rows", "→ set data.valid")
def task_without_validation(w: World) -> list[str]:
    return [*TRAIN, "evaluate.task=exact-match"]


@bad("ask: this question gives no value for Topic", "→")
def question_lacks_a_column(w: World) -> list[str]:
    w.rows([{"Question": "a", "Topic": "t", "Answer": "b"}] * 3)
    w.recipe(ask=[{"Question": "why?"}])
    return [*TRAIN, "data.prompt={Topic}: {Question}", "data.completion={Answer}"]


@bad("ask: a question has 465 tokens", "256 positions", "→")
def question_longer_than_the_window(w: World) -> list[str]:
    w.recipe(ask=["why? " * 90])
    return TRAIN


# --- model folders ---


@bad("model folder", "nowhere does not exist", "→ set `model:` to a folder with config.json")
def model_missing(w: World) -> list[str]:
    return [*TRAIN, "model=nowhere"]


@bad("m.gguf is a file, not a folder", "→ burnish convert", "m.gguf OUT")
def model_a_gguf_file(w: World) -> list[str]:
    w.write("m.gguf", b"GGUF")
    return [*TRAIN, "model=m.gguf"]


@bad("has no config.json, so it is not a Hugging Face model folder", "→ set `model:`")
def model_without_config(w: World) -> list[str]:
    (w.copied_model() / "config.json").unlink()
    return TRAIN


@bad("config.json is not JSON", "→ download config.json again")
def model_config_not_json(w: World) -> list[str]:
    (w.copied_model() / "config.json").write_text("{'model_type': 'qwen2'}")
    return TRAIN


@bad("is not the config of a decoder", "hidden_size is missing", "→")
def model_config_of_something_else(w: World) -> list[str]:
    (w.copied_model() / "config.json").write_text('{"model_type": "clip"}')
    return TRAIN


@bad("has no tokenizer; expected one of tokenizer.json", "→ download the tokenizer files")
def model_without_tokenizer(w: World) -> list[str]:
    for path in w.copied_model().glob("tokenizer*"):
        path.unlink()
    return TRAIN


@bad("the tokenizer in", "cannot be read", "→ download tokenizer.json")
def model_tokenizer_cut_off(w: World) -> list[str]:
    path = w.copied_model() / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:400])
    return TRAIN


@bad("data.jsonl:1: the chat template refuses it: no questions, please", "→")
def model_template_that_refuses(w: World) -> list[str]:
    (w.copied_model() / "chat_template.jinja").write_text("{{ raise_exception('no questions, please') }}")
    return TRAIN


@bad("model.safetensors is truncated:", "its header promises", "→ download model.safetensors again")
def model_weights_truncated(w: World) -> list[str]:
    path = w.copied_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return TRAIN


@bad("is not complete; weight files that are not there:", "-00002-of-00002.safetensors", "→ download")
def model_shard_missing(w: World) -> list[str]:
    folder = w.copied_model()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    return TRAIN


@bad("train.max_length: 300 is more than this model's 256 positions", "→ set train.max_length=256 or less")
def longer_than_the_models_positions(w: World) -> list[str]:
    return [*TRAIN, "train.max_length=300"]


@bad(
    "lora.targets: c_attn not in this model", "its decoder layers have k_proj, o_proj", "→ choose from those"
)
def lora_targets_unknown(w: World) -> list[str]:
    return [*TRAIN, "lora.targets=[c_attn, v_proj]"]


@bad("lora.last_layers: 4, but this model has 3 decoder layers", "→ set lora.last_layers to at most 3")
def lora_too_many_layers(w: World) -> list[str]:
    return [*TRAIN, "lora.last_layers=4"]


@bad("train.keep_layers: 4, but this model has 3 layers", "→")
def keeps_too_many_layers(w: World) -> list[str]:
    return [*TRAIN, "train.keep_layers=4"]


# --- machine ---


@bad("device: mps is not on this machine; there is: cpu", "→ burnish doctor")
def device_not_here(w: World) -> list[str]:
    return [*TRAIN, "device=mps"]


@bad("backend: expected 'auto', 'torch', 'mlx' or 'reference'; got 'mxl'", "→ burnish recipes --schema")
def backend_misspelt(w: World) -> list[str]:
    return [*TRAIN, "backend=mxl"]


@bad("backend: mlx needs mlx and mlx-lm, which are not installed", "→ pip install 'burnish[mlx]'")
def mlx_not_installed(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx"]


@bad("backend: mlx needs mlx-lm, which is not installed", "→ pip install 'burnish[mlx]'")
def mlx_lm_not_installed(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx"]


@bad("device: metal is not on this machine; there is: cpu", "→ burnish doctor")
def metal_not_here(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx", "device=metal"]


@bad(
    "device: cuda: this build of mlx has no CUDA",
    "→ pip uninstall -y mlx-cpu; pip install 'burnish[mlx-cuda]'",
)
def mlx_without_cuda(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx", "device=cuda"]


@bad("quantize: expected 'none', '4bit' or '8bit'; got '3bit'", "→ burnish recipes --schema")
def quantize_to_no_bits(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx", "quantize=3bit"]


@bad(
    "quantize: 8bit is for backend mlx only; this run is planned for torch",
    "→ set quantize=4bit, or backend=mlx",
)
def quantize_8bit_with_torch(w: World) -> list[str]:
    return [*TRAIN, "backend=torch", "quantize=8bit"]


@bad(
    "generation.cache_bits: 8 is for backend mlx only",
    "→ leave generation.cache_bits out, or set backend=mlx",
)
def cache_bits_with_torch(w: World) -> list[str]:
    return [*TRAIN, "backend=torch", "generation.cache_bits=8"]


@bad("generation.cache_bits: expected 4 or 8; got 3", "→ burnish recipes --schema")
def cache_bits_of_no_kind(w: World) -> list[str]:
    return [*TRAIN, "backend=mlx", "generation.cache_bits=3"]


# --- folders that MLX quantised, and models that it cannot read ---


def _mlx_folder(w: World) -> Path:
    """A model in 4 bits, made by `burnish convert`, named four."""
    pytest.importorskip("mlx_lm")
    whole = tiny_model(w.root / "whole", "llama", hidden_size=64, intermediate_size=128)
    said = w.burnish("convert", str(whole), "four", "--quantize", "4bit")
    assert said.code == 0, said.err
    return w.root / "four"


def _change_config(folder: Path, **changes: object) -> None:
    """Keys of config.json set, or taken away where None."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@bad("four is an MLX folder, quantised in 4 bits; backend torch cannot read it", "→ set backend=mlx")
def mlx_folder_with_torch(w: World) -> list[str]:
    _mlx_folder(w)
    return [*TRAIN, "model=four", "backend=torch"]


@bad("four is an MLX folder; it needs mlx and mlx-lm", "→ pip install 'burnish[mlx]'")
def mlx_folder_and_mlx_not_installed(w: World) -> list[str]:
    _mlx_folder(w)
    return [*TRAIN, "model=four"]


@bad("quantize: 8bit, but", "four is quantised already, to 4bit", "→ leave `quantize` out")
def mlx_folder_to_other_bits(w: World) -> list[str]:
    _mlx_folder(w)
    return [*TRAIN, "model=four", "quantize=8bit"]


@bad("packed weights, and config.json has no `quantization` to explain them", "→ use an unquantised copy")
def mlx_folder_without_its_quantization(w: World) -> list[str]:
    _change_config(_mlx_folder(w), quantization=None, quantization_config=None)
    return [*TRAIN, "model=four"]


@bad("quantised in a form burnish does not train: MLX's mxfp4", "→ use an unquantised copy")
def mlx_folder_of_another_mode(w: World) -> list[str]:
    _change_config(_mlx_folder(w), quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    return [*TRAIN, "model=four"]


@bad("four/model.safetensors is truncated:", "→ download model.safetensors again")
def mlx_folder_truncated(w: World) -> list[str]:
    path = _mlx_folder(w) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return [*TRAIN, "model=four"]


@bad("four is quantised already (4 bits by MLX)", "→ burnish trains MLX folders as they are")
def convert_an_mlx_folder(w: World) -> list[str]:
    return ["convert", str(_mlx_folder(w)), "eight", "--quantize", "8bit"]


@bad("four exists", "→ choose another name, or pass --force")
def convert_to_what_exists(w: World) -> list[str]:
    _mlx_folder(w)
    return ["convert", "whole", "four", "--quantize", "4bit"]


@bad("mlx-lm has no model class for model_type 'newllm'", "→ set backend=torch", code=EXIT_FAILED)
def generate_from_a_model_that_mlx_does_not_know(w: World) -> list[str]:
    pytest.importorskip("mlx_lm")
    _change_config(w.copied_model(), model_type="newllm")
    return ["generate", "model", "hello", "--set", "backend=mlx"]


@bad(
    "model-extra.safetensors: there, but not of the model",
    "→ move or rename those files, or set backend=torch",
)
def generate_beside_a_stray_weight_file(w: World) -> list[str]:
    pytest.importorskip("mlx_lm")
    folder = w.copied_model()
    header = b'{"junk":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model-extra.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return ["generate", "model", "hello", "--set", "backend=mlx"]


@bad("adapter is an adapter as mlx-lm keeps it; expected a LoRA adapter of PEFT", "→ burnish convert")
def generate_from_an_adapter_of_mlx_lm(w: World) -> list[str]:
    w.write("adapter/adapter_config.json", '{"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}')
    return ["generate", "adapter", "hello"]


@bad("adapter has no recipe.yaml, and its layers_to_transform names some of the layers only", "→")
def generate_from_an_adapter_of_some_layers(w: World) -> list[str]:
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(w.model), "r": 2, "lora_alpha": 2,
        "target_modules": ["q_proj"], "layers_to_transform": [2],
    }  # fmt: skip
    w.write("adapter/adapter_config.json", json.dumps(config))
    return ["generate", "adapter", "hello"]


@bad(
    "trackers: swanlab needs the package swanlab, which is not installed", "→ pip install 'burnish[swanlab]'"
)
def tracker_not_installed(w: World) -> list[str]:
    return [*TRAIN, "trackers=[swanlab]"]


@bad("this needs 0.", "GiB and 0.0 GiB are there", "→ burnish plan", code=EXIT_WILL_NOT_FIT)
def will_not_fit(w: World) -> list[str]:
    w.recipe(name="too-large")  # `machine` gives this one little memory
    return [*TRAIN, "train.keep_layers=3"]


@bad("out is a file; a run needs a folder of its own", "→ choose another place with --out DIR")
def output_a_file(w: World) -> list[str]:
    w.write("out", "mine")
    return TRAIN


@bad("cannot be made or written", "→ choose another place with --out DIR", code=EXIT_FAILED)
def output_inside_a_file(w: World) -> list[str]:
    w.write("taken", "mine")
    return ["train", "recipe.yaml", "--out", "taken/out"]


@bad("holds no run to resume", "→ leave --resume out to begin one")
def nothing_to_resume(w: World) -> list[str]:
    return [*TRAIN, "--resume"]


# --- generate and convert ---


@bad("nothing is no run, no adapter and no model folder", "→ name a folder that a run has written")
def generate_from_nothing(w: World) -> list[str]:
    return ["generate", "nothing", "hello"]


@bad("there is no prompt", "→ burnish generate", "'your question'")
def generate_without_a_prompt(w: World) -> list[str]:
    return ["generate", str(w.model)]


@bad("prompt 2 has 465 tokens", "this model has 256 positions", "→")
def generate_from_a_prompt_too_long(w: World) -> list[str]:
    return ["generate", str(w.model), "short", "why? " * 90]


@bad("adapter_config.json is not JSON", "→")
def generate_from_a_broken_adapter(w: World) -> list[str]:
    w.write("adapter/adapter_config.json", "{")
    return ["generate", "adapter", "hello"]


@bad("adapter_config.json names no", "→")
def generate_from_an_adapter_of_another_kind(w: World) -> list[str]:
    w.write("adapter/adapter_config.json", '{"peft_type": "IA3"}')
    return ["generate", "adapter", "hello"]


@bad("made elsewhere, with targets that burnish cannot name: 'all-linear'", "→")
def generate_from_an_adapter_with_a_pattern(w: World) -> list[str]:
    config = {
        "base_model_name_or_path": str(w.model),
        "r": 2,
        "lora_alpha": 2,
        "target_modules": "all-linear",
    }
    w.write("adapter/adapter_config.json", json.dumps(config))
    return ["generate", "adapter", "hello"]


@bad("generation.top_p", "got 7", "→")
def generate_with_a_bad_setting(w: World) -> list[str]:
    return ["generate", str(w.model), "hello", "--set", "generation.top_p=7"]


@bad("notes.gguf is not a GGUF file", "→")
def convert_no_gguf(w: World) -> list[str]:
    w.write("notes.gguf", "these are notes " * 9)
    return ["convert", "notes.gguf", "out"]


@bad("gone.gguf", "→")
def convert_missing(w: World) -> list[str]:
    return ["convert", "gone.gguf", "out"]


@bad("dtype: expected float32, float16, bfloat16, got int8", "→ burnish convert")
def convert_to_no_dtype(w: World) -> list[str]:
    w.write("m.gguf", "GGUF")
    return ["convert", "m.gguf", "out", "--dtype", "int8"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A fixed machine without a GPU, so that these cases are the same anywhere."""
    from dataclasses import replace

    import burnish.cli.generate
    import burnish.cli.plan
    import burnish.training.material
    from tests.tiny import GPU, MACHINE

    others = {
        "will_not_fit": replace(MACHINE, free_ram_bytes=50 << 20),
        "mlx_not_installed": replace(MACHINE, versions={}),
        "mlx_lm_not_installed": replace(MACHINE, versions={"mlx": "0.32.4"}),
        "mlx_without_cuda": replace(MACHINE, gpus=(GPU,)),
    }
    this = next((other for name, other in others.items() if name in request.node.name), MACHINE)
    for module in (burnish.training.material, burnish.cli.plan, burnish.cli.generate):
        monkeypatch.setattr(module, "probe", lambda _: this)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input_is_a_sentence(case: Case, world: World, monkeypatch: pytest.MonkeyPatch):
    home = world.root / "HOME"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    args = case.spoil(world)
    before = world.tree()
    said = world.burnish(*args)
    assert said.code == case.code, said
    assert "Traceback" not in said.err
    assert said.out == ""
    assert said.err.startswith("burnish: ")
    assert "\n  → " in said.err, f"no next step: {said.err}"
    at = 0
    for part in case.says:
        assert part in said.err[at:], f"{part!r} is not (in this order) in: {said.err}"
        at = said.err.index(part, at)
    assert world.tree() == before, "something was written, or left behind"


def test_the_table_is_long_enough():
    assert len(CASES) >= 60
    assert len({c.name for c in CASES}) == len(CASES)


def test_the_world_that_is_spoilt_is_good(world: World):
    """Else every case above might fail for another reason than its own."""
    said = world.train()
    assert (said.code, said.err) == (0, "")
    assert said.event("finished")["step"] == 2


def test_home_is_expanded_in_every_path(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(world.root))
    world.copied_model()
    world.rows(PAIRS[:4], "valid.jsonl")
    said = world.burnish(
        "train", "~/recipe.yaml", "model=~/model", "data.train=~/data.jsonl", "data.valid=~/valid.jsonl",
        "--out", "~/out", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert (world.out / "adapter" / "adapter_model.safetensors").is_file()
    assert not (world.root / "~").exists()
    answered = world.burnish("generate", "~/out", "question 1", "--json")
    assert answered.code == 0, answered.err


# Some of them once more as a person runs them: a process of its own, whose stderr and exit code are real.


@pytest.mark.parametrize("name", ["recipe_unknown_key", "model_weights_truncated"])
def test_bad_input_of_a_real_process(name: str, world: World):
    (case,) = [c for c in CASES if c.name == name]
    args = case.spoil(world)
    before = world.tree()
    script = Path(sys.executable).with_name("burnish")
    command = (
        [str(script)] if script.exists() else [sys.executable, "-c", "import burnish.cli as c; c.main()"]
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*command, *args], cwd=world.root, env=env, capture_output=True, text=True)
    assert done.returncode == case.code, done.stderr
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in case.says)
    assert world.tree() == before
