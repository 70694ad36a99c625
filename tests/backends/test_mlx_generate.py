"""Generation on MLX: equal to no cache at all, whatever is batched, cut, reused, dropped or made narrow."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tiny models are made with torch and transformers")
pytest.importorskip("mlx_lm")

from burnish.machine.blas import use_openblas

use_openblas()

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import ConcatenateKVCache, QuantizedKVCache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from burnish import backends  # noqa: E402
from burnish.backends.base import Sampling, Token  # noqa: E402
from burnish.backends.mlx import generate as module  # noqa: E402
from burnish.backends.mlx.generate import generate, merges  # noqa: E402
from burnish.backends.mlx.prefix import PrefixCache, common  # noqa: E402
from burnish.backends.sampling import choose, stream  # noqa: E402
from burnish.errors import OutOfMemory, Unsupported, UserError  # noqa: E402
from burnish.models.tokenizer import load_tokenizer  # noqa: E402
from tests.tiny import tiny_model, tiny_plan  # noqa: E402

SMOL = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
RNG = np.random.default_rng(0)
WINDOW = 8
SHARED = RNG.integers(3, 280, 20).tolist()
PROMPTS = [
    [*SHARED, *RNG.integers(3, 280, 7).tolist()],
    [50],  # nothing to read before the first round
    [*SHARED, 9],
    RNG.integers(3, 280, 33).tolist(),
    RNG.integers(3, 280, 5).tolist(),  # shorter than the window
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"head_dim": 8, "tied": True},
    "wide": {"family": "llama", "hidden_size": 128, "num_hidden_layers": 2},  # heads of 32 numbers
}


class Watched:
    """A model that notes the shape [rows, tokens] of each pass."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shapes: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.shapes.append((tokens.shape[0], tokens.shape[1]))
        return self._model(tokens, cache=cache)

    @property
    def read(self) -> int:
        """Tokens of passes of a single row."""
        return sum(n for rows, n in self.shapes if rows == 1)


class Unmergeable(Watched):
    """Its caches are of a kind that holds one row only."""

    def make_cache(self) -> list[Any]:
        return [ConcatenateKVCache() for _ in self.layers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def load(folder: Path) -> Any:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            path = tiny_model(folder / name, **{"family": name, **FAMILIES[name]})
            config = json.loads((path / "config.json").read_text())
            if name == "mistral":  # mlx-lm lets layers slide that are named, and only those
                config["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
            (path / "config.json").write_text(json.dumps(config))
            loaded[name] = load_model(path)[0]
        return loaded[name]

    return load


def ask(model: Any, prompts: Sequence[Sequence[int]], prefixes: PrefixCache | None = None, **how: Any) -> Any:
    sampling = Sampling(**{"max_new_tokens": 8, **how})
    return list(generate(model, prompts, sampling, prefixes or PrefixCache()))


def of_row(tokens: Sequence[Token], row: int) -> list[Token]:
    return [t for t in tokens if t.row == row]


def assert_same(a: Sequence[Token], b: Sequence[Token], atol: float = 1e-5) -> None:
    assert [(t.id, t.finish) for t in a] == [(t.id, t.finish) for t in b]
    np.testing.assert_allclose([t.logprob for t in a], [t.logprob for t in b], atol=atol)


def assert_as_without_cache(model: Any, prompt: Sequence[int], answer: Sequence[Token]) -> None:
    """Each token is the most likely after all before it, by one pass over the whole."""
    ids = [*prompt, *(t.id for t in answer)]
    logits_TV = np.array(model(mx.array([ids]))[0], np.float64)[len(prompt) - 1 : -1]
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    assert [t.id for t in answer] == logits_TV.argmax(-1).tolist()
    expected = logprobs_TV[np.arange(len(answer)), [t.id for t in answer]]
    np.testing.assert_allclose([t.logprob for t in answer], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_a_batch_is_what_no_cache_gives(
    family: str, chunk: int, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = Watched(load(family))
    answers = ask(model, PROMPTS, max_new_tokens=14)
    assert [t.row for t in answers] == list(range(len(PROMPTS))) * 14
    assert [t.finish for t in answers] == [""] * 13 * len(PROMPTS) + ["length"] * len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert_as_without_cache(model, prompt, of_row(answers, row))
        assert_same(ask(model, [prompt], max_new_tokens=14), of_row(answers, row))
    passes = model.shapes[: model.shapes.index((1, len(PROMPTS[0]) + 14))]
    assert max(n for _, n in passes) == min(chunk, 32)


def test_rows_share_a_pass_where_the_model_allows(load: Any) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert merges(load(family)), family
    assert not merges(load("gemma2")), "its mask of 2 rows would be taken for one of 2 heads"
    together, apart = Watched(load("llama")), Unmergeable(load("llama"))
    assert not merges(apart)  # type: ignore[arg-type]
    together.shapes.clear()
    a, b = ask(together, PROMPTS), ask(apart, PROMPTS)
    assert_same(a, b)
    assert together.shapes[-8:] == [(5, 1)] * 8 and apart.shapes[-40:] == [(1, 1)] * 40


@pytest.mark.parametrize("wrap", [Watched, Unmergeable])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_that_have_ended_are_not_computed(family: str, wrap: type[Watched], load: Any) -> None:
    """And the others do not notice, whether the longest ended or the shortest."""
    model = load(family)
    whole = ask(model, PROMPTS, max_new_tokens=12)
    first = {row: [t.id for t in of_row(whole, row)] for row in range(len(PROMPTS))}
    stops = (first[1][2], first[3][4])
    watched = wrap(model)
    cut = ask(watched, PROMPTS, max_new_tokens=12, stop_ids=stops)
    ended = 0
    for row in range(len(PROMPTS)):
        at = next((i for i, id in enumerate(first[row]) if id in stops), 11)
        ended += at < 11
        got, expected = of_row(cut, row), of_row(whole, row)[: at + 1]
        assert [t.id for t in got] == [t.id for t in expected]
        np.testing.assert_allclose([t.logprob for t in got], [t.logprob for t in expected], atol=1e-5)
        assert got[-1].finish == ("stop" if got[-1].id in stops else "length")
    assert 2 <= ended < len(PROMPTS)
    rounds = [rows * n for rows, n in watched.shapes[-12:]]
    if wrap is Watched:
        assert rounds == sorted(rounds, reverse=True) and rounds[-1] == len(PROMPTS) - ended
    else:
        assert len(cut) == watched.read - sum(n for _, n in watched.shapes[: -len(cut)])


def test_tokens_are_chosen_as_everywhere(load: Any) -> None:
    """By `choose`, from the row's own stream, with all before it seen: prompt and answer."""
    how = Sampling(20, temperature=1.5, top_p=0.95, top_k=100, repetition_penalty=1.4, seed=3)
    model, forgot = load("qwen2"), 0
    prompts = [PROMPTS[4], PROMPTS[4], [50]]
    answers = list(generate(model, prompts, how, PrefixCache()))
    for row, prompt in enumerate(prompts):
        ids, rng = list(prompt), stream(how.seed, row)
        for token in of_row(answers, row):
            logits_V = np.array(model(mx.array([ids]))[0, -1])
            state = rng.bit_generator.state
            assert choose(logits_V, ids, how, rng)[0] == token.id
            again = stream(how.seed, row)
            again.bit_generator.state = state
            forgot += choose(logits_V, prompt, how, again)[0] != token.id
            ids.append(token.id)
    assert forgot, "no token was repeated, so nothing was seen"
    assert [t.id for t in of_row(answers, 0)] != [t.id for t in of_row(answers, 1)]


def test_sampling_is_each_rows_own(load: Any) -> None:
    how = {"temperature": 1.5, "top_p": 0.95, "top_k": 100, "repetition_penalty": 1.2, "seed": 3}
    first = ask(load("qwen2"), PROMPTS, **how)
    assert_same(first, ask(load("qwen2"), PROMPTS, **how))
    mixed = ask(load("qwen2"), [[8, 9], PROMPTS[1], [3] * 40], **how)
    assert_same(of_row(first, 1), of_row(mixed, 1))
    assert_same(of_row(first, 0), ask(load("qwen2"), PROMPTS[:1], **how))
    greedy = ask(load("qwen2"), PROMPTS)
    assert [t.id for t in first] != [t.id for t in greedy]


def test_what_rows_have_in_common_is_read_once(load: Any) -> None:
    prompts = [[*SHARED, *tail] for tail in ([9, 8, 7], [5, 6], [9, 8, 7, 4, 3])]
    model = Watched(load("llama"))
    answers = ask(model, prompts)
    assert model.read == (len(SHARED) + 2) + 1 + 2  # the third goes on from the first's three, less none
    for row, prompt in enumerate(prompts):
        assert_as_without_cache(load("llama"), prompt, of_row(answers, row))


@pytest.mark.parametrize("bits", [0, 8])
def test_the_next_call_starts_from_what_is_held(bits: int, load: Any) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6, "cache_bits": bits}
    a, b = [*SHARED, 4, 5, 6], [*SHARED, 8, 9]
    model, prefixes = Watched(load("wide")), PrefixCache()
    afresh = [ask(model, [p], **how) for p in (a, b)]
    model.shapes.clear()
    first = ask(model, [a], prefixes, **how)
    assert model.read == len(a) - 1 + 6
    second = ask(model, [b], prefixes, **how)
    assert model.read == (len(a) - 1 + 6) + (len(b) - 1 - len(SHARED) + 6)
    for got, expected in zip((first, second), afresh, strict=True):
        assert_same(got, expected)
    model.shapes.clear()
    assert_same(ask(model, [b], prefixes, **how), afresh[1])
    assert model.read == 6, "the same question again reads nothing but its last token"
    assert_same(ask(model, [SHARED[:9]], prefixes, **how), ask(model, [SHARED[:9]], **how))
    model.shapes.clear()
    prefixes.clear()
    assert prefixes.held_bytes == 0
    ask(model, [b], prefixes, **how)
    assert model.read == len(b) - 1 + 6
    model.shapes.clear()
    ask(model, [b], prefixes, **{**how, "cache_bits": 4})
    assert model.read == len(b) - 1 + 6, "numbers of another width are not taken"


def test_an_answer_leaves_what_is_held_as_it_was(load: Any) -> None:
    """The cache that an answer is written into is another."""
    prefixes = PrefixCache()
    ask(load("llama"), [PROMPTS[0]], prefixes, max_new_tokens=40)
    again = ask(load("llama"), [PROMPTS[0]], prefixes, max_new_tokens=40)
    ask(load("llama"), [[*PROMPTS[0][:-1], 99]], prefixes, max_new_tokens=40)
    assert_same(again, ask(load("llama"), [PROMPTS[0]], max_new_tokens=40))
    assert_same(again, ask(load("llama"), [PROMPTS[0]], prefixes, max_new_tokens=40))


def test_what_is_held_is_bounded(load: Any) -> None:
    token_bytes = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, size, float32
    prefixes, model = PrefixCache(10 * token_bytes + 5), Watched(load("llama"))
    expected = ask(load("llama"), [PROMPTS[0]])
    ask(model, [PROMPTS[0]], prefixes)
    assert prefixes.held_bytes == 10 * token_bytes
    read = model.read
    assert_same(ask(model, [PROMPTS[0]], prefixes), expected)
    assert model.read == 2 * read - 10
    none = PrefixCache(token_bytes - 1)
    ask(load("llama"), [PROMPTS[0]], none)
    assert none.held_bytes == 0


@pytest.mark.parametrize("wrap", [Watched, Unmergeable])
def test_caches_that_cannot_be_cut_are_not_held(wrap: type[Watched], load: Any) -> None:
    model, prefixes = wrap(load("mistral" if wrap is Watched else "llama")), PrefixCache()
    a = ask(model, [PROMPTS[3], PROMPTS[3]], prefixes)
    assert prefixes.held_bytes == 0 and model.read >= 2 * 32
    assert_same(of_row(a, 0), of_row(a, 1))


def test_common_beginnings() -> None:
    pairs = [([1, 2, 3], [1, 2, 4]), ([1, 2], [1, 2, 3]), ([5], [6]), ([], [1]), ([7, 8], [7, 8])]
    assert [common(np.array(a, np.int32), np.array(b, np.int32)) for a, b in pairs] == [2, 2, 0, 0, 2]


def test_a_quantised_cache_is_near_and_small(load: Any) -> None:
    model = load("wide")
    held, answers = {}, {}
    for bits in (0, 8, 4):
        prefixes = PrefixCache()
        answers[bits] = ask(model, [*PROMPTS[1:], PROMPTS[0]], prefixes, cache_bits=bits, max_new_tokens=1)
        held[bits] = prefixes.held_bytes
    # A group of 32 numbers and its scale and offset, of 32 bits each.
    assert held[8] / held[0] == (8 + 2) / 32 and held[4] / held[0] == (4 + 2) / 32
    far = {
        bits: max(
            abs(a.logprob - b.logprob) for a, b in zip(answers[bits], answers[0], strict=True) if a.id == b.id
        )
        for bits in (8, 4)
    }
    assert 0 < far[8] < 0.05 and far[8] < far[4] < 1
    batch = ask(model, PROMPTS, cache_bits=8)
    for row, prompt in enumerate(PROMPTS):
        assert_same(of_row(batch, row), ask(model, [prompt], cache_bits=8))


def test_no_quantised_cache(load: Any, tiny_folder: Path) -> None:
    for family, why in (("mistral", "RotatingKVCache"), ("llama", "multiple of 32"), ("gemma2", "attention")):
        model = load(family)
        if family == "gemma2":
            model = load_model_with_heads_of_32(tiny_folder.parent / "gemma2 wide")
        with pytest.raises(Unsupported, match=why):
            ask(model, [PROMPTS[0]], cache_bits=8)
        ask(model, [PROMPTS[0]])  # and nothing is left behind
    for backend in ("reference", "torch"):
        learner = backends.open(tiny_plan(tiny_folder, backend=backend))
        with pytest.raises(Unsupported, match="quantised key-value cache is for backend mlx"):
            list(learner.generate([[5, 6]], Sampling(2, cache_bits=8)))


def load_model_with_heads_of_32(path: Path) -> Any:
    return load_model(tiny_model(path, "gemma2", tied=True, head_dim=32))[0]


def test_no_prompt_no_token_no_room(load: Any) -> None:
    assert ask(load("llama"), []) == [] and ask(load("llama"), [[5]], max_new_tokens=0) == []
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(load("llama"), [[5], []], Sampling(2), PrefixCache())


def test_logits_of_a_prompt_are_not_made(folder: Path) -> None:
    words, n = 20_000, 200
    model = load_model(tiny_model(folder / "words", "llama", vocab_size=words, num_hidden_layers=1))[0]
    prompt = RNG.integers(3, words, n).tolist()
    ask(model, [prompt], max_new_tokens=1)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    ask(model, [prompt], max_new_tokens=1)
    assert mx.get_peak_memory() - before < n * words * 4 / 4
    mx.reset_peak_memory()
    mx.eval(model(mx.array([prompt])))
    assert mx.get_peak_memory() - before >= n * words * 4, "nothing was measured"


def test_closing_frees_the_cache(load: Any) -> None:
    prefixes = PrefixCache(0)
    prompts = [PROMPTS[3], PROMPTS[0]] * 8
    ask(load("llama"), prompts, prefixes)
    gc.collect()
    before = mx.get_active_memory()
    tokens: Iterator[Token] = generate(load("llama"), prompts, Sampling(20), prefixes)
    for _ in range(2 * len(prompts)):
        next(tokens)
    assert mx.get_active_memory() - before >= 2 * 3 * 16 * 26 * 2 * 8 * 4
    tokens.close()  # type: ignore[attr-defined]
    assert mx.get_active_memory() - before < 4096 and mx.get_cache_memory() == 0


def test_out_of_memory_gives_back_what_is_held(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = PrefixCache()
    ask(load("llama"), [PROMPTS[0]], prefixes)
    assert prefixes.held_bytes

    def full(*_: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(module._Rows, "logits", full)
    with pytest.raises(OutOfMemory):
        ask(load("llama"), [PROMPTS[0]], prefixes)
    assert prefixes.held_bytes == 0


@pytest.mark.skipif(not (SMOL / "model.safetensors").exists(), reason="SmolLM2 is not in .cache: run make")
def test_8_bits_answer_alike_on_smollm2() -> None:
    model = load_model(SMOL)[0]
    model.set_dtype(mx.float32)
    tokenizer = load_tokenizer(SMOL)
    for question in ("What is the capital of France?", "Name three primary colours.", "What is 2 + 2?"):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt, held = tokenizer.encode(text), {bits: PrefixCache() for bits in (0, 8)}
        plain, narrow = (ask(model, [prompt], held[bits], cache_bits=bits) for bits in (0, 8))
        assert [t.id for t in narrow] == [t.id for t in plain], question
        assert 0 < max(abs(a.logprob - b.logprob) for a, b in zip(plain, narrow, strict=True)) < 0.1
        assert held[8].held_bytes * 2 < held[0].held_bytes
        assert all(type(layer) is QuantizedKVCache for layer in held[8].known(8)[0].cache)
