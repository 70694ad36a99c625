"""Tokenizers in a GGUF file: llama.cpp makes of a text what the tokenizer of the training makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from burnish.errors import UserError
from burnish.export.gguf import check_gguf, write_gguf
from burnish.export.gguf_vocabulary import _DEEPSEEK_LLM_LETTERS, read_vocabulary
from burnish.models.gguf_tokenizer import SPLITS, _merges_from_scores
from burnish.models.tokenizer import load_tokenizer
from tests.export.gguf_world import Tuned, tuned
from tests.tiny import CHATML, tiny_model

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
ROWS = 700  # of the embedding matrix; the vocabularies are smaller
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "The capital of France is Paris.",
    "1 12 123 1234 12345678 3.14159 1,000,000 2024-07-26 ٣٤٥ ½ ²",
    "我想在apple工作1314151天～ 漢字かな交じり文。한국어 텍스트",
    "🚀🙂 😶\u200d🌫️ 👩\u200d👩\u200d👧 ✅🦙🦙",
    "  two   three    four\t\ttabs \t mixed\n\n\n lines \r\n\r\n end   ",
    "\n", " ", "   ", "\t", "a\n \n b", "x  \n  y",
    "I'm you're he'll we'd they've it's don't I'M YOU'RE 'twas rock'n'roll",
    "def f(x):\n    return x**2 + 10  # ok\n\n\tif (a != b) { c[i] += \"s\"; }",
    "SELECT name, COUNT(*) FROM t WHERE a = 'b c' GROUP BY 1;",
    "Ünïcödé café naïve Ωμέγα Привет мир ąęłżź ǅ ß",
    "مرحبا بالعالم नमस्ते दुनिया สวัสดี កាន់តែ",
    "....!!!!???? ------ ====== ''''''``` \"\"\" «quoted» “curly” …",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "left<|im_end|>right <|im_end|> spaced<think>in</think>out",
    "<not special> <|nor this|> </s> <unk>",
    "CamelCaseWords snake_case_words kebab-case HTTPServer x86_64 v1.2.3",
    "e\u0301 is not é here",  # two characters: NFC would make them one
    "a" * 300, "ab " * 100,
)  # fmt: skip
NFD = TEXTS[-3]
_MARKS = re.compile("[\u0300-\u036f\u064b-\u0652\u0900-\u0903\u093e-\u094d\u0e31-\u0e4e\u17b6-\u17d3\ufe0f]")


def cut_by(name: str) -> Any:
    cuts = [pre_tokenizers.Split(Regex(r), behavior="isolated") for r in SPLITS[name]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def deepseek_llm() -> Any:
    cuts = [r"[\r\n]", _DEEPSEEK_LLM_LETTERS, "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
            "[一-龥ࠀ-一가-\ud7ff]+"]  # fmt: skip
    return pre_tokenizers.Sequence([
        *[pre_tokenizers.Split(Regex(r), behavior="isolated") for r in cuts],
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


PRE: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: cut_by("qwen2"),
    "llama-bpe": lambda: cut_by("llama-bpe"),
    "smaug-bpe": lambda: cut_by("llama-bpe"),  # llama 3's cuts without its ignore_merges
    "tekken": lambda: cut_by("tekken"),
    "deepseek-coder": lambda: cut_by("deepseek-coder"),
    "deepseek-llm": deepseek_llm,
}


def byte_level(pre: str, nfc: bool = False) -> Tokenizer:
    """Its merges are learned from texts that are not cut, so that every place where a text is cut shows."""
    inner = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "deepseek-llm" else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, whole])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if nfc:
        inner.normalizer = normalizers.NFC()  # type: ignore[assignment]
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    inner.pre_tokenizer = PRE[pre]()
    inner.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return inner


def sentencepiece(prefix: bool = True, bos: bool = True, gemma: bool = False) -> Tokenizer:
    """As Llama 2's: bytes for what is unknown, merges by score. gemma: runs of spaces and of lines are added
    tokens, joined before all else.
    """
    runs = ("\n\n", "▁▁", "▁▁▁▁")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    words.train_from_iterator(
        TEXTS[:16], trainers.BpeTrainer(vocab_size=320, show_progress=False, max_token_length=8)
    )
    learned = sorted(words.get_vocab(), key=words.get_vocab().__getitem__)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *byte_tokens,
        *SPECIALS[1:],
        *(runs if gemma else ()),
        *learned,
        *runs[1:],
    ]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    merges = _merges_from_scores(vocab, [-float(i) for i in range(len(vocab))])
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    inner.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIALS[1:]])
    if gemma:
        inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in runs])
    if bos:
        inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return inner


def model_with(folder: Path, inner: Tokenizer, **named: str) -> Tuned:
    from transformers import PreTrainedTokenizerFast

    model = tiny_model(folder / "model", "llama", vocab_size=ROWS, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    names = {"eos_token": "<|im_end|>", **named}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    made.chat_template = CHATML
    made.save_pretrained(str(model))
    config = json.loads((model / "config.json").read_text())
    config["eos_token_id"] = inner.token_to_id(names["eos_token"])
    (model / "config.json").write_text(json.dumps(config))
    return tuned(folder / "run", base=model)


def differences(made: Tuned, file: Path, texts: Sequence[str] = TEXTS) -> dict[str, Any]:
    """Of each text where they differ: what llama.cpp makes of it, and what the tokenizer does."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'burnish[gguf]'")
    from transformers import AutoTokenizer

    from burnish.export.llama import open_llama

    write_gguf(made.merged, made.source, file, "f32")
    theirs = AutoTokenizer.from_pretrained(str(made.source.adapter))
    consumer = open_llama(file)
    try:
        both = {text: (consumer.tokens(text), theirs(text).input_ids) for text in texts}
    finally:
        consumer.close()
    return {text: pair for text, pair in both.items() if pair[0] != pair[1]}


@pytest.mark.llama
@pytest.mark.parametrize("pre", PRE)
def test_byte_level(pre: str, tmp_path: Path):
    made = model_with(tmp_path, byte_level(pre))
    found = read_vocabulary(made.source, ROWS)
    assert found.pre == pre and bool(found.notes) == (pre == "tekken")
    texts = [t for t in TEXTS if pre != "tekken" or not _MARKS.search(t)]
    assert differences(made, tmp_path / "m.gguf", texts) == {}


@pytest.mark.llama
def test_what_is_said_of_tekken_is_true(tmp_path: Path):
    made = model_with(tmp_path, byte_level("tekken"))
    differ = differences(made, tmp_path / "m.gguf")
    assert differ and all(_MARKS.search(t) for t in differ)
    assert "combining marks" in read_vocabulary(made.source, ROWS).notes[0]


@pytest.mark.llama
@pytest.mark.parametrize(("pre", "other"), [("smollm", "gpt-2"), ("gpt-2", "qwen2"), ("qwen2", "llama-bpe")])
def test_control_another_name_gives_other_tokens(
    pre: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from burnish.export import gguf_vocabulary

    monkeypatch.setattr(gguf_vocabulary, "_name_of", lambda *_: other)
    assert differences(model_with(tmp_path, byte_level(pre)), tmp_path / "m.gguf")


@pytest.mark.llama
def test_nfc_is_said_and_only_it_differs(tmp_path: Path):
    made = model_with(tmp_path, byte_level("qwen2", nfc=True))
    assert "NFC" in read_vocabulary(made.source, ROWS).notes[0]
    assert set(differences(made, tmp_path / "m.gguf")) == {NFD}


@pytest.mark.llama
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece(prefix: bool, bos: bool, tmp_path: Path):
    made = model_with(tmp_path, sentencepiece(prefix, bos), unk_token="<unk>", bos_token="<s>")
    if made.source.chat and bos:  # its chat template writes none, so chats were trained without one
        assert not read_vocabulary(made.source, ROWS).add_bos
    made = replace(made, source=replace(made.source, chat=False))
    found = read_vocabulary(made.source, ROWS)
    assert (found.model, found.add_bos, found.add_space_prefix) == ("llama", bos, prefix)
    assert differences(made, tmp_path / "m.gguf") == {}


@pytest.mark.llama
def test_runs_of_spaces_that_are_tokens_of_their_own(tmp_path: Path):
    made = model_with(tmp_path, sentencepiece(prefix=False, gemma=True), unk_token="<unk>", bos_token="<s>")
    made = replace(made, source=replace(made.source, chat=False))
    found = read_vocabulary(made.source, ROWS)
    assert {found.tokens[i] for i, kind in enumerate(found.kinds) if kind == 4} == {"\n\n", "  ", "    "}
    assert differences(made, tmp_path / "m.gguf") == {}


@pytest.mark.slow
@pytest.mark.llama
def test_smollm2(tmp_path: Path):
    if not SMOLLM2.is_dir():
        pytest.skip(f"SmolLM2 is not at {SMOLLM2}: run make")
    made = tuned(tmp_path / "run", base=SMOLLM2)
    found = read_vocabulary(made.source, 49152)
    assert found.pre == "smollm"
    assert found.ids["eos"] == 2 and found.ids["bos"] == 1 and not found.add_bos
    assert differences(made, tmp_path / "m.gguf") == {}


def test_the_r1_name_of_qwens_cuts(tmp_path: Path):
    inner = byte_level("qwen2")
    inner.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜User｜>"])
    made = model_with(tmp_path, inner, bos_token="<｜begin▁of▁sentence｜>")
    found = read_vocabulary(made.source, ROWS)
    assert found.pre == "deepseek-r1-qwen"
    at = found.tokens.index("<｜User｜>")
    assert (found.tokens[at], found.kinds[at]) == ("<｜User｜>", 3)
    think = found.tokens.index("<think>")
    assert found.kinds[think] == 4 and found.kinds[-1] == 5 and len(found.tokens) == ROWS


def test_what_ends_an_answer(tmp_path: Path):
    """Its token is eos, unless the template writes the tokenizer's own eos by name; then it is eot."""
    made = model_with(tmp_path, byte_level("gpt-2"), eos_token="<|endoftext|>")
    source = replace(made.source, tokenizer=made.source.tokenizer.with_stop(2))
    ids = read_vocabulary(source, ROWS).ids
    assert (ids["eos"], ids["eot"]) == (2, 0)  # ChatML closes with <|im_end|>
    named = source.tokenizer.with_template(CHATML + "{# eos_token #}")
    ids = read_vocabulary(replace(source, tokenizer=named), ROWS).ids
    assert (ids["eos"], ids["eot"]) == (0, 2)
    ids = read_vocabulary(replace(source, chat=False), ROWS).ids
    assert (ids["eos"], ids["eot"]) == (0, 2)  # plain text is closed by the tokenizer's eos


def test_a_prefix_for_the_first_word_only(tmp_path: Path):
    inner = sentencepiece(prefix=False)
    inner.normalizer = None  # type: ignore[assignment]
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    made = model_with(tmp_path, inner, unk_token="<unk>", bos_token="<s>")
    chat = read_vocabulary(made.source, ROWS)
    plain = read_vocabulary(replace(made.source, chat=False), ROWS)
    assert (chat.add_space_prefix, plain.add_space_prefix) == (False, True)
    assert "first word" in chat.notes[0]


def edited(made: Tuned, change: Callable[[dict[str, Any]], None]) -> Any:
    path = made.source.adapter / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    change(saved)
    path.write_text(json.dumps(saved), encoding="utf-8")
    return made.source


def _set(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: Any) -> None:
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = to

    return change


def _twice(saved: dict[str, Any]) -> None:
    """A word of the vocabulary with the text of a filler: llama.cpp would end the process."""
    saved["model"]["vocab"][f"[PAD{ROWS - 1}]"] = 650


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other cuts": (
        _set("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,4}"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}),
        "no name of llama.cpp's is known",
    ),
    "another step": (_set("pre_tokenizer", to={"type": "Whitespace"}), "Whitespace.* is not known"),
    "a space in front": (_set("pre_tokenizer", "add_prefix_space", to=True), "ByteLevel.* is not known"),
    "another normalizer": (_set("normalizer", to={"type": "Lowercase"}), "none or NFC, got Lowercase"),
    "whole words": (_set("model", "ignore_merges", to=True), "ignore_merges: llama.cpp's gpt-2 has False"),
    "unigram": (_set("model", "type", to="Unigram"), "expected a BPE, got Unigram"),
    "flags": (_set("added_tokens", 1, "rstrip", to=True), r"im_start.*does not know rstrip"),
    "too many": (_set("added_tokens", 1, "id", to=ROWS), f"has {ROWS + 1} tokens; .* {ROWS} rows"),
    "twice": (_twice, "1 tokens have the text of another one"),
    "around": (
        _set("post_processor", to={"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {}}),
        "puts bos and eos around",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llama_cpp_would_not_follow(kind: str, tmp_path: Path):
    change, match = REFUSED[kind]
    source = edited(model_with(tmp_path, byte_level("gpt-2")), change)
    with pytest.raises(UserError, match=match) as e:
        check_gguf(source, "f16")
    assert e.value.hint


def test_pairs_that_llama_cpp_would_join(tmp_path: Path):
    made = model_with(tmp_path, sentencepiece(), unk_token="<unk>", bos_token="<s>")

    def drop(saved: dict[str, Any]) -> None:
        del saved["model"]["merges"][5]

    with pytest.raises(UserError, match="would join 1 pairs that are no merges"):
        check_gguf(edited(made, drop), "f16")


def test_no_tokenizer_json(tmp_path: Path):
    made = model_with(tmp_path, byte_level("gpt-2"))
    (made.source.adapter / "tokenizer.json").unlink()
    (made.spec.folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check_gguf(made.source, "f16")


def test_the_template_is_the_trained_one(tmp_path: Path):
    made = model_with(tmp_path, byte_level("gpt-2"))
    other = load_tokenizer(made.source.adapter, model=made.spec.folder).with_template(
        "{{ 'other' }}" + CHATML
    )
    assert read_vocabulary(replace(made.source, tokenizer=other), ROWS).template == "{{ 'other' }}" + CHATML
