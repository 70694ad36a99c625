"""The tokenizer that the adapter was trained with, in llama.cpp's words.

    vocabulary = read_vocabulary(source, rows)      # rows of the embedding matrix; raises UserError
    vocabulary.pre                                  # 'qwen2': how llama.cpp cuts a text before merging

llama.cpp knows two kinds that matter here: byte-level BPE, whose way of cutting a text has a name and is
written in its C++, and SentencePiece's, where only scores decide. What is in tokenizer.json is compared with
what llama.cpp does; whatever it would do otherwise is an error, for a near miss tokenises a prompt into what
the model never saw. The files are read, not the library: it is what `Tokenizer.save` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.template import ChatTemplate
from burnish.errors import UserError, all_problems
from burnish.export.ollama import adds_bos
from burnish.export.source import Source
from burnish.models.gguf_tokenizer import SPLITS, WHOLE_WORDS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_DIGIT = r"\p{N}"
_GPT2 = SPLITS["gpt-2"][0]
_DEEPSEEK_LLM_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ"
    r"-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-"
    r"ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
# How a text is cut → the name that llama.cpp has for it. Of several names with one meaning, the usual one.
_NAMES: Mapping[tuple[str, ...], str] = {
    **{SPLITS[name]: name for name in ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "deepseek-coder")},
    (
        r"[\r\n]",
        _DEEPSEEK_LLM_LETTERS,
        r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+".replace(r"\u3000", "\u3000"),
        r"\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
        _DIGIT,
    ): "deepseek-llm",
}
_SPACE = "▁"
_R1_BOS = "<｜begin▁of▁sentence｜>"


@dataclass(frozen=True)
class Vocabulary:
    model: str  # 'gpt2' (byte-level BPE) or 'llama' (SentencePiece's BPE)
    pre: str
    tokens: Sequence[str]  # one for each row of the embedding matrix
    kinds: Sequence[int]
    merges: Sequence[str]  # of gpt2: 'Ġ t', the first to be made first
    scores: Sequence[float]  # of llama: the highest is joined first
    ids: Mapping[str, int]  # 'bos', 'eos', 'eot', 'eom', 'unk', 'pad'
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    template: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Files:
    folder: Path
    saved: Mapping[str, Any]  # tokenizer.json
    named: Mapping[str, str]  # 'bos_token' → '<s>'

    @property
    def model(self) -> Mapping[str, Any]:
        return self.saved["model"]

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        return self.saved.get("added_tokens") or []


def read_vocabulary(source: Source, rows: int) -> Vocabulary:
    """Raises UserError for a tokenizer that llama.cpp would not follow token by token."""
    files = _read(source)
    problems: list[str] = []
    tokens, kinds = _tokens(files, rows, problems)
    cuts, byte_level = _cuts(files.saved.get("pre_tokenizer"), problems)
    notes: list[str] = []
    merges: list[str] = []
    scores: list[float] = []
    pre, prefix = "default", False
    if byte_level:
        pre = _name_of(files, cuts, problems)
        merges = [" ".join(pair) for pair in _pairs(files)]
        if files.saved.get("normalizer") and not problems:
            notes.append("llama.cpp does not bring a text into Unicode's NFC first; text mostly is in it")
        if pre == "tekken":
            notes.append("llama.cpp's tekken cuts words at combining marks (Hindi, Thai, accents apart)")
    else:
        prefix = _prefix(files, source, notes, problems)
        scores = _scores(files, tokens, kinds, problems)
        if not files.model.get("byte_fallback"):
            problems.append("model.byte_fallback: expected true where the tokens are not byte-level")
    before, after = _around(files.saved.get("post_processor"))
    ids = _ids(source, files, {t: i for i, t in enumerate(tokens)})
    if before not in ([], [files.named.get("bos_token")]) or after not in (
        [],
        [files.named.get("eos_token")],
    ):
        problems.append(f"post_processor: llama.cpp puts bos and eos around a text, not {before} and {after}")
    if problems:
        raise all_problems(
            f"the tokenizer in {files.folder} is not one that llama.cpp follows:",
            problems,
            "export a Hugging Face folder or an MLX one instead: those hold this very tokenizer",
        )
    model = "gpt2" if byte_level else "llama"
    return Vocabulary(
        model, pre, tokens, kinds, merges, scores, ids, adds_bos(source), bool(after), prefix,
        source.tokenizer.template, tuple(notes),
    )  # fmt: skip


def _read(source: Source) -> _Files:
    folder = next((f for f in (source.adapter, source.base.folder) if (f / "tokenizer.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"{source.adapter} has no tokenizer.json", "copy the run's adapter folder again, whole"
        )
    try:
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise UserError(f"the tokenizer in {folder} is not JSON: {e}", "copy the folder again, whole") from e
    kind = (saved.get("model") or {}).get("type")
    if kind != "BPE":
        raise UserError(
            f"{folder / 'tokenizer.json'}: expected a BPE, got {kind}", "export a Hugging Face folder instead"
        )
    named = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token:
            named[key] = token
    return _Files(folder, saved, named)


def _tokens(files: _Files, rows: int, problems: list[str]) -> tuple[list[str], list[int]]:
    """The vocabulary, filled up to `rows` with tokens that nothing makes, and each one's kind."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    found: dict[str, int] = {**files.model["vocab"], **{t["content"]: t["id"] for t in files.added}}
    if max(found.values()) >= rows:
        problems.append(f"it has {max(found.values()) + 1} tokens; the embedding matrix has {rows} rows")
        return tokens, kinds
    unknown = files.named.get("unk_token") or files.model.get("unk_token")
    bytes_ = {f"<0x{i:02X}>" for i in range(256)} if files.model.get("byte_fallback") else set()
    for token, i in found.items():
        tokens[i], kinds[i] = token, BYTE if token in bytes_ else NORMAL
    for t in files.added:
        flags = [f for f in ("lstrip", "rstrip", "single_word") if t.get(f)]
        if flags:
            problems.append(f"{t['content']}: llama.cpp does not know {' or '.join(flags)}")
        kinds[t["id"]] = CONTROL if t["special"] else USER_DEFINED
        if bytes_ and not t["special"]:  # it looks for these before spaces become ▁
            tokens[t["id"]] = t["content"].replace(_SPACE, " ")
    if bytes_ and unknown in found:
        kinds[found[unknown]] = UNKNOWN
    twice = len(tokens) - len(set(tokens))
    if twice:
        problems.append(f"{twice} tokens have the text of another one")  # llama.cpp would abort
    return tokens, kinds


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A pre-tokenizer, normalizer or post-processor as a list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get(key, ()) for step in _steps(inner, key)]


def _cuts(part: Mapping[str, Any] | None, problems: list[str]) -> tuple[tuple[str, ...], bool]:
    """The expressions that a text is cut by, one after the other, and whether bytes are its alphabet."""
    cuts: list[str] = []
    byte_level = False
    for step in _steps(part, "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                cuts.append(regex)
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
                cuts.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                cuts.append(_DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                cuts += [_GPT2] if step.get("use_regex", True) else []
            case {"type": "Metaspace", "split": False}:
                pass  # it cuts nothing; what it puts before a text is seen to elsewhere
            case _:
                problems.append(f"pre_tokenizer: {json.dumps(step, ensure_ascii=False)[:120]} is not known")
    return tuple(cuts), byte_level


def _name_of(files: _Files, cuts: tuple[str, ...], problems: list[str]) -> str:
    name = _NAMES.get(cuts)
    if name is None:
        problems.append(f"pre_tokenizer: no name of llama.cpp's is known for {[c[:60] for c in cuts]}")
        return ""
    form = [step["type"] for step in _steps(files.saved.get("normalizer"), "normalizers")]
    if form not in ([], ["NFC"]):
        problems.append(f"normalizer: expected none or NFC, got {', '.join(form)}")
    whole = bool(files.model.get("ignore_merges"))
    if name == "llama-bpe" and not whole:
        return "smaug-bpe"  # llama 3's cuts, and every token made by merges
    if whole != (name in WHOLE_WORDS):
        problems.append(f"model.ignore_merges: llama.cpp's {name} has {not whole}, got {whole}")
    if name == "deepseek-llm" and any((a + b).isdigit() for a, b in _pairs(files)):
        problems.append("llama.cpp's deepseek-llm does not part digits, and this vocabulary joins them")
    if name == "qwen2" and _R1_BOS in files.model["vocab"] | {t["content"]: 0 for t in files.added}:
        return "deepseek-r1-qwen"  # the same cuts
    return name


def _pairs(files: _Files) -> Iterator[tuple[str, str]]:
    for merge in files.model.get("merges", ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _prefix(files: _Files, source: Source, notes: list[str], problems: list[str]) -> bool:
    """Whether a ▁ is put before a text, and after each special token in it."""
    steps = _steps(files.saved.get("normalizer"), "normalizers")
    kinds = [s["type"] for s in steps]
    escapes = any(s["type"] == "Replace" and s.get("content") == _SPACE for s in steps)
    spaces = [
        s for s in _steps(files.saved.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"
    ]
    if not set(kinds) <= {"Prepend", "Replace"} or not (escapes or spaces):
        problems.append(
            f"normalizer: expected spaces to become ▁ and no more, got {', '.join(kinds) or 'none'}"
        )
    scheme = spaces[0].get("prepend_scheme", "always") if spaces else "never"
    if scheme == "first":
        # llama.cpp has no "only at the beginning of a text". A chat begins with a special token.
        notes.append(
            "llama.cpp cannot put a space before the first word only; "
            + ("none is put, as in a chat" if source.chat else "special tokens inside a text get one too")
        )
        return not source.chat
    return scheme == "always" or "Prepend" in kinds


def _scores(files: _Files, tokens: Sequence[str], kinds: Sequence[int], problems: list[str]) -> list[float]:
    """The rank of the merge that makes a token, negated. llama.cpp joins any neighbours that make a token,
    best score first: so each such pair must be a merge, and all merges of one token must follow each other.
    """
    scores = [-1e6] * len(tokens)
    vocab: Mapping[str, int] = files.model["vocab"]
    merges = list(_pairs(files))
    last, torn = "", set()
    for rank, (left, right) in enumerate(merges):
        made = left + right
        if made == last:
            continue
        if scores[vocab[made]] != -1e6:
            torn.add(made)
        else:
            scores[vocab[made]] = -float(rank)
        last = made
    known = set(merges)
    other = [
        (word[:at], word[at:])
        for word, i in vocab.items()
        if kinds[i] == NORMAL
        for at in range(1, len(word))
        if word[:at] in vocab and word[at:] in vocab and (word[:at], word[at:]) not in known
    ]
    if torn:
        problems.append(f"{len(torn)} tokens are made by merges of different rank, {min(torn)!r} for one")
    if other:
        problems.append(f"llama.cpp would join {len(other)} pairs that are no merges, {other[0]} for one")
    return scores


def _around(part: Mapping[str, Any] | None) -> tuple[list[str | None], list[str | None]]:
    """The special tokens before and after a text."""
    before: list[str | None] = []
    after: list[str | None] = []
    for step in _steps(part, "processors"):
        if step["type"] != "TemplateProcessing":
            continue
        seen = False
        for piece in step["single"]:
            if "Sequence" in piece:
                seen = True
            else:
                (after if seen else before).append(piece["SpecialToken"]["id"])
    return before, after


def _ids(source: Source, files: _Files, places: Mapping[str, int]) -> dict[str, int]:
    """bos, eos and their like. What ended an answer in training ends one in llama.cpp: as eos where the
    template does not write the tokenizer's own eos by its name, else as eot, which ends one too.
    """
    tokenizer = source.tokenizer
    named = {key: places[t] for key, t in files.named.items() if t in places}
    ends = list(tokenizer.stop_ids)
    if source.chat and tokenizer.has_chat_template:
        end = ChatTemplate(tokenizer).end
        ends = [*([tokenizer.special[end]] if end else []), *ends]
    if (not source.chat or "eos_token" in tokenizer.template) and tokenizer.eos_id is not None:
        ends = [tokenizer.eos_id, *ends]
    ends = list(dict.fromkeys(ends))
    if not ends:
        raise UserError(
            f"nothing ends an answer: the tokenizer in {files.folder} has no end-of-sequence token",
            "name its eos_token in tokenizer_config.json",
        )
    ids: dict[str, int] = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids.setdefault("eot", ids["eos"])  # else llama.cpp looks for one by its spelling
    # Without one, llama.cpp would take token 11 for it.
    ids["bos"] = named.get("bos_token", named.get("pad_token", ids["eos"]))
    ids |= {key: named[f"{key}_token"] for key in ("unk", "pad") if f"{key}_token" in named}
    return ids
