"""The tokenizer that a GGUF file describes, written as Hugging Face files.

    write_tokenizer(metadata, folder)     # tokenizer.json, tokenizer_config.json

It is built here, from the `tokenizers` library, and not with `AutoTokenizer(gguf_file=…)`, because
transformers 5.23 needs torch for that, splits SmolLM's digits as GPT-2 would, and leaves out DeepSeek's
`<｜User｜>` tokens (it takes them for a mistake, as they are not written in the byte alphabet). A way of
splitting text that is not in the table is an error: a near miss would train on tokens the model never saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from burnish.errors import UserError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre → the expressions that cut the text, one after the other (src/llama-vocab.cpp of
# llama.cpp).
SPLITS: Mapping[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "tekken": (_TEKKEN,),
    "deepseek-coder": _DEEPSEEK_CODER,
}
WHOLE_WORDS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
}  # a word in the vocabulary is one token, merges or not
ADDS_BOS = WHOLE_WORDS  # unless the file says otherwise


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer, special tokens and chat template. Raises UserError for an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"tokenizer.ggml.model: expected gpt2 or llama, got {kind}",
            "use the model's safetensors folder instead",
        )
    tokens = _tokens(metadata)
    tokenizer = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    special = {
        name: _token(metadata, key)
        for name, key in {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }.items()
    }
    _add_whole(tokenizer, metadata, tokens, [t for t in special.values() if t is not None])
    tokenizer.post_processor = _ends(metadata, kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary without the fillers (`[PAD151665]`) that llama.cpp appends to it."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    n = len(tokens)
    while n and kinds[n - 1] == UNUSED:
        n -= 1
    if not n:
        raise UserError(
            "this GGUF file holds no vocabulary (tokenizer.ggml.tokens)", "download a complete GGUF file"
        )
    return tokens[:n]


def _token(metadata: Mapping[str, Any], key: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    tokens = metadata["tokenizer.ggml.tokens"]
    return tokens[number] if number is not None and number < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UserError(
            f"tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}, got {pre}",
            "use the model's safetensors folder instead",
        )
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges", ())]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(r), behavior="isolated") for r in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # Qwen's own tokenizer.json has it; GGUF cannot say so
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE as llama 2 and Mistral have it: spaces are `▁`, unknown characters are bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            unk_token=_token(metadata, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _merges_from_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a word into two words, best-scored word first: the order in which SentencePiece joins."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for word, i in vocab.items():
        for at in range(1, len(word)):
            left, right = word[:at], word[at:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _add_whole(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], named: Sequence[str]
) -> None:
    """Tokens found whole, before anything cuts the text. Each is in the vocabulary, so its id stays."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, kind in zip(tokens, kinds, strict=False):
        special = kind == CONTROL or (token in named)
        if special or kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])


def _ends(metadata: Mapping[str, Any], kind: str) -> Any:
    """What is put before and after a text: bos and eos, where the file asks for them."""
    by_default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in ADDS_BOS
    bos = _token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", by_default) else None
    eos = _token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ids = {bos: metadata.get("tokenizer.ggml.bos_token_id"), eos: metadata.get("tokenizer.ggml.eos_token_id")}

    def around(*texts: str) -> list[str]:
        return [part for text in texts for part in (bos, text, eos) if part is not None]

    if bos is None and eos is None:
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=around("$A:0"),
        pair=around("$A:0", "$B:1"),
        special_tokens=[(token, number) for token, number in ids.items() if token is not None],
    )
