"""The published shapes of well-known dense decoders, for a plan before any download (see `geometry.py`).

Values are those of each model's config.json; where a hub states how many parameters a model has,
tests/models/test_geometry.py holds the shape against that number. What could not be confirmed is left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    family: str  # models of one family and tokenizer, in which a smaller one can take a larger one's place
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    window: int | None = None  # config.json's sliding_window, where the model uses it


@dataclass(frozen=True)
class Published:
    """A model on a hub. Models that were tuned from one another share a geometry."""

    hub_id: str
    geometry: str  # a key of GEOMETRIES
    max_positions: int
    eos: tuple[int, ...]  # (): not confirmed


# fmt: off
GEOMETRIES = {
    # family, model_type, hidden, layers, heads, kv heads, head_dim, intermediate, vocab, tied, window
    # Qwen2 and Qwen2.5 have the same shapes; biases on q, k and v.
    "qwen2.5-0.5b": Geometry("qwen2.5", "qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": Geometry("qwen2.5", "qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-3b": Geometry("qwen2.5", "qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True),
    "qwen2.5-7b": Geometry("qwen2.5", "qwen2", 3584, 28, 28, 4, 128, 18944, 152064),
    "qwen2.5-14b": Geometry("qwen2.5", "qwen2", 5120, 48, 40, 8, 128, 13824, 152064),
    "qwen2.5-32b": Geometry("qwen2.5", "qwen2", 5120, 64, 40, 8, 128, 27648, 152064),
    "qwen2.5-72b": Geometry("qwen2.5", "qwen2", 8192, 80, 64, 8, 128, 29568, 152064),
    # q and k are normed, head by head.
    "qwen3-0.6b": Geometry("qwen3", "qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "qwen3-1.7b": Geometry("qwen3", "qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "qwen3-4b": Geometry("qwen3", "qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "qwen3-8b": Geometry("qwen3", "qwen3", 4096, 36, 32, 8, 128, 12288, 151936),
    "qwen3-14b": Geometry("qwen3", "qwen3", 5120, 40, 40, 8, 128, 17408, 151936),
    "qwen3-32b": Geometry("qwen3", "qwen3", 5120, 64, 64, 8, 128, 25600, 151936),
    # Qwen2.5's shapes, but the smallest has a head of its own.
    "r1-distill-qwen-1.5b": Geometry("r1-distill-qwen", "qwen2", 1536, 28, 12, 2, 128, 8960, 151936),
    "r1-distill-qwen-7b": Geometry("r1-distill-qwen", "qwen2", 3584, 28, 28, 4, 128, 18944, 152064),
    "r1-distill-qwen-14b": Geometry("r1-distill-qwen", "qwen2", 5120, 48, 40, 8, 128, 13824, 152064),
    "r1-distill-qwen-32b": Geometry("r1-distill-qwen", "qwen2", 5120, 64, 40, 8, 128, 27648, 152064),
    "r1-distill-llama-8b": Geometry("r1-distill-llama", "llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "r1-distill-llama-70b": Geometry("r1-distill-llama", "llama", 8192, 80, 64, 8, 128, 28672, 128256),
    "llama-3.2-1b": Geometry("llama-3", "llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": Geometry("llama-3", "llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "llama-3.1-8b": Geometry("llama-3", "llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "llama-3.1-70b": Geometry("llama-3", "llama", 8192, 80, 64, 8, 128, 28672, 128256),
    "deepseek-coder-1.3b": Geometry("deepseek-coder", "llama", 2048, 24, 16, 16, 128, 5504, 32256),
    "deepseek-coder-6.7b": Geometry("deepseek-coder", "llama", 4096, 32, 32, 32, 128, 11008, 32256),
    # Trained on from DeepSeek-LLM-7B: other depth and vocabulary than the 6.7B.
    "deepseek-coder-7b": Geometry("deepseek-coder", "llama", 4096, 30, 32, 32, 128, 11008, 102400),
    "mistral-7b-v0.1": Geometry("mistral", "mistral", 4096, 32, 32, 8, 128, 14336, 32000, window=4096),
    "mistral-7b-v0.2": Geometry("mistral", "mistral", 4096, 32, 32, 8, 128, 14336, 32000),
    "mistral-7b-v0.3": Geometry("mistral", "mistral", 4096, 32, 32, 8, 128, 14336, 32768),
    "mistral-nemo-12b": Geometry("mistral", "mistral", 5120, 40, 32, 8, 128, 14336, 131072),
    "gemma-2-2b": Geometry("gemma-2", "gemma2", 2304, 26, 8, 4, 256, 9216, 256000, True, 4096),
    "gemma-2-9b": Geometry("gemma-2", "gemma2", 3584, 42, 16, 8, 256, 14336, 256000, True, 4096),
    "gemma-2-27b": Geometry("gemma-2", "gemma2", 4608, 46, 32, 16, 128, 36864, 256000, True, 4096),
    # q, k and v are one matrix, gate and up another.
    "phi-3.5-mini": Geometry("phi", "phi3", 3072, 32, 32, 32, 96, 8192, 32064, window=262144),
    "phi-4": Geometry("phi", "phi3", 5120, 40, 40, 10, 128, 17920, 100352),
    "smollm2-135m": Geometry("smollm2", "llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "smollm2-360m": Geometry("smollm2", "llama", 960, 32, 15, 5, 64, 2560, 49152, True),
    "smollm2-1.7b": Geometry("smollm2", "llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "smollm3-3b": Geometry("smollm3", "smollm3", 2048, 36, 16, 4, 128, 11008, 128256, True),
}

_QWEN_BASE, _QWEN_CHAT = (151643,), (151645, 151643)
_LLAMA_BASE, _LLAMA_CHAT = (128001,), (128001, 128008, 128009)
_LONG = 131072

# A geometry's first model is what its short name stands for.
PUBLISHED = (
    *(Published(f"Qwen/Qwen2.5-{b}B", f"qwen2.5-{b}b", 32768 if b in ("0.5", "3") else _LONG, _QWEN_BASE)
      for b in ("0.5", "1.5", "3", "7", "14", "32", "72")),
    *(Published(f"Qwen/Qwen2.5-{b}B-Instruct", f"qwen2.5-{b}b", 32768, _QWEN_CHAT)
      for b in ("0.5", "1.5", "3", "7", "14", "32", "72")),
    *(Published(f"Qwen/Qwen2-{b}B", f"qwen2.5-{b}b", _LONG, _QWEN_BASE)
      for b in ("0.5", "1.5", "7", "72")),
    *(Published(f"Qwen/Qwen2-{b}B-Instruct", f"qwen2.5-{b}b", 32768, _QWEN_CHAT)
      for b in ("0.5", "1.5", "7", "72")),
    *(Published(f"Qwen/Qwen2.5-Coder-{b}B", f"qwen2.5-{b}b", 32768, _QWEN_BASE)
      for b in ("0.5", "1.5", "3", "7", "14", "32")),
    *(Published(f"Qwen/Qwen2.5-Coder-{b}B-Instruct", f"qwen2.5-{b}b", 32768, _QWEN_CHAT)
      for b in ("0.5", "1.5", "3", "7", "14", "32")),
    *(Published(f"Qwen/Qwen3-{b}B", f"qwen3-{b}b", 40960, _QWEN_CHAT)
      for b in ("0.6", "1.7", "4", "8", "14", "32")),
    *(Published(f"Qwen/Qwen3-{b}B-Base", f"qwen3-{b}b", 32768, _QWEN_BASE)
      for b in ("0.6", "1.7", "4", "8", "14")),
    *(Published(f"Qwen/Qwen3-4B-{kind}-2507", "qwen3-4b", 262144, _QWEN_CHAT)
      for kind in ("Instruct", "Thinking")),
    *(Published(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{b}B", f"r1-distill-qwen-{b}b", _LONG, (151643,))
      for b in ("1.5", "7", "14", "32")),
    *(Published(f"deepseek-ai/DeepSeek-R1-Distill-Llama-{b}B", f"r1-distill-llama-{b}b", _LONG, (128001,))
      for b in ("8", "70")),
    *(Published(f"meta-llama/Llama-3.2-{b}B", f"llama-3.2-{b}b", _LONG, _LLAMA_BASE) for b in ("1", "3")),
    *(Published(f"meta-llama/Llama-3.2-{b}B-Instruct", f"llama-3.2-{b}b", _LONG, _LLAMA_CHAT)
      for b in ("1", "3")),
    *(Published(f"meta-llama/{meta}Llama-3.1-{b}B", f"llama-3.1-{b}b", _LONG, _LLAMA_BASE)
      for meta in ("", "Meta-") for b in ("8", "70")),
    *(Published(f"meta-llama/{meta}Llama-3.1-{b}B-Instruct", f"llama-3.1-{b}b", _LONG, _LLAMA_CHAT)
      for meta in ("", "Meta-") for b in ("8", "70")),
    Published("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b", _LONG, _LLAMA_CHAT),
    *(Published(f"meta-llama/Meta-Llama-3-{b}B", f"llama-3.1-{b}b", 8192, _LLAMA_BASE) for b in ("8", "70")),
    *(Published(f"meta-llama/Meta-Llama-3-{b}B-Instruct", f"llama-3.1-{b}b", 8192, (128001, 128009))
      for b in ("8", "70")),
    *(Published(f"deepseek-ai/deepseek-coder-{b}b-base", f"deepseek-coder-{b}b", 16384, (32014,))
      for b in ("1.3", "6.7")),
    *(Published(f"deepseek-ai/deepseek-coder-{b}b-instruct", f"deepseek-coder-{b}b", 16384, (32021,))
      for b in ("1.3", "6.7")),
    Published("deepseek-ai/deepseek-coder-7b-base-v1.5", "deepseek-coder-7b", 4096, ()),
    Published("deepseek-ai/deepseek-coder-7b-instruct-v1.5", "deepseek-coder-7b", 4096, ()),
    *(Published(f"mistralai/Mistral-7B-{kind}v0.1", "mistral-7b-v0.1", 32768, (2,))
      for kind in ("", "Instruct-")),
    Published("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b-v0.2", 32768, (2,)),
    *(Published(f"mistralai/Mistral-7B-{kind}v0.3", "mistral-7b-v0.3", 32768, (2,))
      for kind in ("", "Instruct-")),
    *(Published(f"mistralai/Mistral-Nemo-{kind}-2407", "mistral-nemo-12b", 128000, (2,))
      for kind in ("Base", "Instruct")),
    *(Published(f"google/gemma-2-{b}b{kind}", f"gemma-2-{b}b", 8192, (1, 107) if kind else (1,))
      for kind in ("", "-it") for b in ("2", "9", "27")),
    Published("microsoft/Phi-3.5-mini-instruct", "phi-3.5-mini", _LONG, (32000, 32001, 32007)),
    Published("microsoft/phi-4", "phi-4", 16384, (100257, 100265)),
    *(Published(f"HuggingFaceTB/SmolLM2-{b}", f"smollm2-{b.lower()}", 8192, (0,))
      for b in ("135M", "360M", "1.7B")),
    *(Published(f"HuggingFaceTB/SmolLM2-{b}-Instruct", f"smollm2-{b.lower()}", 8192, (2,))
      for b in ("135M", "360M", "1.7B")),
    Published("HuggingFaceTB/SmolLM3-3B", "smollm3-3b", 65536, (128012,)),
    Published("HuggingFaceTB/SmolLM3-3B-Base", "smollm3-3b", 65536, (128001,)),
)

# What people also call them: a short name or a folder's → a short name or the last part of a hub id.
ALIASES = {
    **{f"qwen2-{b}b": f"qwen2.5-{b}b" for b in ("3", "14", "32")},  # Qwen2 itself has the other sizes
    "deepseek-coder-7b-base": "deepseek-coder-7b-base-v1.5",
    "deepseek-coder-7b-instruct": "deepseek-coder-7b-instruct-v1.5",
    "llama-3-8b": "meta-llama-3-8b", "llama-3-70b": "meta-llama-3-70b",
    "llama-3.3-70b": "llama-3.3-70b-instruct",
    "mistral-7b": "mistral-7b-v0.3", "mistral-nemo": "mistral-nemo-12b",
    "gemma2-2b": "gemma-2-2b", "gemma2-9b": "gemma-2-9b", "gemma2-27b": "gemma-2-27b",
    "phi3.5-mini": "phi-3.5-mini", "phi4": "phi-4",
}
# fmt: on
