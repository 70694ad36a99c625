"""Every family that mlx-lm and transformers share: right in every number, or refused with a reason.

A case is a tiny model of random weights, saved by transformers. Loss, scores and every adapter gradient of a
packed step must be those of transformers and PEFT on each example alone; a model that is neither so nor
refused is one on which people would train something else without a word. The id says what is asked:
`right`; `alone` where packed rows may be refused, if rows of one example are right; `refused`; `either`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
torch = pytest.importorskip("torch", reason="tiny models are made with torch and transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from burnish.data.batches import Batch, split  # noqa: E402
from burnish.data.packing import packed_split  # noqa: E402
from burnish.errors import Unsupported, UserError  # noqa: E402
from tests.backends.peft_truth import assert_same, scores, truth  # noqa: E402
from tests.backends.test_packing_equal import Measured  # noqa: E402
from tests.tiny import random_example, tiny_plan  # noqa: E402

VOCAB = 280
KEYS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
OLD = {"rope_theta": 10000.0, "partial_rotary_factor": None}  # what config.json held before transformers 5


@dataclass(frozen=True)
class Case:
    family: str
    verdict: str
    what: str = ""
    keys: dict[str, Any] = field(default_factory=dict)  # of transformers' config
    raw: dict[str, Any] = field(default_factory=dict)  # of config.json alone, as model hubs have it
    targets: str = "attention+mlp"

    def __str__(self) -> str:
        return "-".join(x for x in (self.family, self.what, self.verdict) if x)


def case(family: str, verdict: str, what: str = "", raw: dict[str, Any] | None = None, **keys: Any) -> Case:
    return Case(family, verdict, what, keys, raw or {})


def attention(asked: Case) -> Case:
    """The same with adapters on attention alone, where experts do not stand in the way."""
    verdict = "refused" if asked.family == "gpt_oss" else "right"
    return replace(asked, verdict=verdict, what="attention", targets="attention")


def rope(kind: str, **how: Any) -> dict[str, Any]:
    """The same words for both readers: `rope_parameters` (transformers 5), `rope_scaling` (before)."""
    scaling = {"rope_type": kind, **how}
    return {
        "rope_parameters": {"rope_theta": 10000.0, **scaling},
        "raw": {"rope_scaling": {"type": kind, **scaling}, "rope_theta": 10000.0},
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EVERY: list[Case] = [
    # --- dense decoders of the Llama line ---
    case("llama", "right", "tied", tie_word_embeddings=True),
    case("llama", "right", "eps", rms_norm_eps=0.05),
    case("llama", "right", "llama3-rope", **rope("llama3", original_max_position_embeddings=32, **LLAMA3)),
    case("llama", "right", "linear-rope", **rope("linear", factor=4.0)),
    case("llama", "right", "dynamic-rope", **rope("dynamic", factor=4.0), max_position_embeddings=64),
    case("llama", "refused", "gelu", hidden_act="gelu"),
    case("mistral", "right", "window", sliding_window=8),
    case("mistral", "right", "no-window", sliding_window=None),
    case("ministral3", "refused"),
    case("qwen2", "refused", "window", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    case("qwen2", "right", "yarn", **rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    case("qwen3", "right", "eps", rms_norm_eps=0.05, head_dim=16),
    case("qwen3", "refused", "bias", attention_bias=True),
    case("qwen3", "right", "yarn", **rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    case("phi3", "right", sliding_window=None),
    case("phi3", "refused", "window", sliding_window=8),
    case("phi3", "refused", "longrope", sliding_window=None, original_max_position_embeddings=32, **rope(
        "longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0, 3.0, 4.0, 6.0])),
    case("smollm3", "right", num_hidden_layers=4, no_rope_layer_interval=4),
    case("seed_oss", "right"),
    case("granite", "right", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
         logits_scaling=2.0),
    case("helium", "right"),
    case("ernie4_5", "right"),
    case("hunyuan_v1_dense", "alone"),
    case("internlm3", "right"),
    case("olmo2", "right"),
    case("olmo3", "right", num_hidden_layers=4, sliding_window=8, raw={"rope_theta": 500000.0}),
    case("olmo3", "right", "bare", num_hidden_layers=4, sliding_window=8),
    case("exaone4", "right", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=4,
         raw={"rope_scaling": None, "sliding_window_pattern": "LLLG"}),
    case("glm4", "right", raw={"partial_rotary_factor": 0.5}),
    case("glm", "refused", raw={"partial_rotary_factor": 0.5}),
    case("apertus", "right", raw={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    case("nanochat", "refused"),
    # --- others: norms, caps, parallel layers, their own activations ---
    case("gemma", "right", hidden_size=64),
    case("gemma2", "alone", hidden_size=64, final_logit_softcapping=5.0, attn_logit_softcapping=4.0,
         query_pre_attn_scalar=12),
    case("gemma2", "refused", "window", hidden_size=64, sliding_window=8),
    case("gemma3_text", "right", hidden_size=64, num_hidden_layers=6, sliding_window=8,
         query_pre_attn_scalar=12, raw={"sliding_window_pattern": 6, "rope_theta": 1_000_000.0}),
    case("gemma4_text", "refused"),
    case("cohere", "right", logit_scale=0.5),
    case("cohere", "right", "qk-norm", logit_scale=0.5, use_qk_norm=True),
    case("cohere2", "right", num_hidden_layers=4, sliding_window=8, logit_scale=0.5,
         raw={"sliding_window_pattern": 4}),
    case("stablelm", "right", use_qkv_bias=True, raw={"partial_rotary_factor": 0.25}, head_dim=None),
    case("stablelm", "right", "parallel", num_hidden_layers=3, use_parallel_residual=True, qk_layernorm=True,
         raw={"partial_rotary_factor": 0.25}),
    case("starcoder2", "right", "gelu", hidden_act="gelu", sliding_window=None),
    case("starcoder2", "refused", "tanh", sliding_window=None),
    case("starcoder2", "refused", "window", hidden_act="gelu", sliding_window=8),
    case("phi", "right", num_key_value_heads=4, raw={"partial_rotary_factor": 0.5}),
    case("nemotron", "right", raw={"partial_rotary_factor": 0.5}),
    case("gptj", "refused", rotary_dim=8),
    case("gpt_neox", "refused", raw={"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    case("gpt2", "refused", raw={"n_ctx": 256}),
    case("gpt_bigcode", "refused"),
    case("olmo", "either"),  # this module of mlx-lm ends the process where another package is missing
    case("minicpm3", "refused"),
    case("bitnet", "refused"),
    # --- states, and what is no decoder ---
    case("mamba", "refused"),
    case("falcon_h1", "refused"),
    case("lfm2", "refused"),
    case("recurrent_gemma", "refused", num_hidden_layers=3),
]  # fmt: skip
FEW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: list[Case] = [
    case("mixtral", "refused", num_local_experts=4, **FEW),
    case("olmoe", "refused", num_experts=4, **FEW),
    case("qwen3_moe", "refused", raw={"num_experts": 4}, num_experts=4, **FEW),
    case("qwen2_moe", "refused", shared_expert_intermediate_size=16, raw={"num_experts": 4}, num_experts=4,
         **FEW),
    case("granitemoe", "refused", num_local_experts=4, **FEW),
    case("gpt_oss", "refused", num_local_experts=4, **FEW),
]  # fmt: skip
# Transformers 5 writes `rope_parameters`, not `rope_theta`: a reader of old keys would take a default.
NEW_KEYS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "starcoder2")


def build(folder: Path, asked: Case) -> Path:
    """The model on disk. Norms stay near what they were; all else is drawn wide enough to be told apart."""
    config = AutoConfig.for_model(asked.family, **{**KEYS, **asked.keys})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.empty_like(p).normal_(0, 0.2, generator=generator)
            p.copy_(p + 0.5 * drawn if p.ndim == 1 and "norm" in name else drawn)
    model.save_pretrained(str(folder))
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    rope_parameters = saved.get("rope_parameters") or {}
    old = {k: rope_parameters[k] for k in OLD if k in rope_parameters}
    path.write_text(json.dumps({**old, **saved, **asked.raw}))
    return folder


def outcome(folder: Path, tmp: Path, targets: str = "attention+mlp") -> str:
    """'right', 'alone' or 'refused'; AssertionError where it is none of them."""
    rng = np.random.default_rng(2)
    examples = [random_example(rng, n, VOCAB) for n in (41, 9, 25, 12, 2)]
    try:
        agrees(folder, tmp / "packed", targets, True, packed_split(examples, 2, 48))
        return "right"
    except (Unsupported, UserError) as e:
        print(f"packed rows are refused: {e}")
        assert len(str(e)) > 30, f"this does not say why: {e}"
        if "pack" not in str(e):
            return "refused"
    try:
        agrees(folder, tmp / "alone", targets, False, split(examples, 3))
        return "alone"
    except (Unsupported, UserError) as e:
        print(f"all rows are refused: {e}")
        assert "pack" not in str(e), f"it was not packed: {e}"
        return "refused"


def agrees(folder: Path, tmp: Path, targets: str, pack: bool, micros: list[Batch]) -> None:
    """AssertionError unless every number is transformers' and PEFT's; raises what the backend raises."""
    tmp.mkdir()
    asked = {"clip": None, "weight_decay": 0, "keep_layers": 1, "pack": pack}
    plan = tiny_plan(folder, backend="mlx", lora={"targets": targets}, train=asked)
    measured = Measured(plan, tmp)
    mine = measured.step(micros)
    assert_same(mine, truth(measured.start, micros), loss=2e-5)
    got = measured.learner.score(micros[0]).nll_BT
    np.testing.assert_allclose(got, scores(measured.start, micros[0]), atol=2e-4)


@pytest.mark.parametrize("asked", [*EVERY, *EXPERTS, *map(attention, EXPERTS)], ids=str)
def test_right_or_refused(asked: Case, tmp_path: Path) -> None:
    got = outcome(build(tmp_path / "model", asked), tmp_path, asked.targets)
    good = {"alone": ("alone", "right"), "either": ("right", "alone", "refused")}
    assert got in good.get(asked.verdict, (asked.verdict,)), f"it is {got}"


@pytest.mark.parametrize("family", NEW_KEYS)
def test_a_folder_as_transformers_5_writes_it(family: str, tmp_path: Path) -> None:
    """The base of the rotation stands in `rope_parameters` alone, and is not the default."""
    keys = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "sliding_window": None}
    own = {"gemma2": {"hidden_size": 64, "sliding_window": 64}, "starcoder2": {"hidden_act": "gelu"}}
    folder = build(tmp_path / "model", Case(family, "either", keys={**keys, **own.get(family, {})}))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    assert config["rope_parameters"]["rope_theta"] == 300
    outcome(folder, tmp_path)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_is_no_decoder_is_refused(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    keys = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8} if family == "t5" else {}
    config = AutoConfig.for_model(family, **{**KEYS, **keys})
    model = AutoModel.from_config(config)
    model.save_pretrained(str(tmp_path / "model"))
    assert outcome(tmp_path / "model", tmp_path) == "refused"
