"""A base in 4 bits, and the numbers that it stands for: computed here, in NumPy, from the definition.

MLX (affine): a group of 64 weights in a row has a scale and a bias; eight 4-bit numbers q lie in 32 bits, the
first lowest; the weight is q · scale + bias. bitsandbytes (NF4; Dettmers et al. 2023, arXiv 2305.14314,
appendix E): 64 weights in a row have their largest magnitude; the weight is one of sixteen levels times it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from burnish import backends
from burnish.backends.adapter_folder import read_floats
from burnish.models.spec import ModelSpec, read_config, read_spec
from burnish.models.weights import Weights
from burnish.training.selftest.world import MODEL, write_model

GROUP, BITS = 64, 4
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


def four_bits(backend: str, place: Path, folder: Path) -> tuple[Path, str, Path]:
    """A model folder and the recipe's `quantize` that make a base in 4 bits; and the folder, written within
    `folder`, of the same weights in float32.
    """
    source, plain = place / MODEL, folder / "plain"
    plain.mkdir()
    if backend == "mlx":
        packed = folder / "packed"
        # Scales stored in float32: rounded to 16 bits, they would be other numbers here and in the backend.
        backends.mlx_part("quantize").quantize_folder(source, packed, BITS, group_size=GROUP, dtype="float32")
        weights = affine_weights(read_spec(packed))
    else:
        packed, weights = source, nf4_weights(read_floats(source / "model.safetensors"))
    write_model(plain, read_config(source), weights, "float32")
    return packed, "4bit", plain


def nf4_weights(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every linear layer's weight rounded; the embeddings, which are the head too, stay."""
    return {k: nf4(v) if v.ndim == 2 and ".layers." in k else v for k, v in weights.items()}


def nf4(weight: np.ndarray) -> np.ndarray:
    """float32 [out, in], in a multiple of 64, to the nearest level of each group."""
    groups = weight.reshape(-1, GROUP)
    largest = np.abs(groups).max(1, keepdims=True)
    between = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[np.searchsorted(between, groups / largest)] * largest).reshape(weight.shape)


def affine_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Of a folder that MLX packed: every weight, unpacked where it is."""
    read, found = Weights(spec), {}
    for name, info in spec.tensors.items():
        module, _, leaf = name.rpartition(".")
        is_packed = f"{module}.scales" in spec.tensors
        if not is_packed or leaf not in ("weight", "scales", "biases"):
            found[name] = read.rows(name, 0, _rows(info.shape)).reshape(info.shape)
        elif leaf == "weight":
            with (spec.folder / info.file).open("rb") as f:
                f.seek(info.begin)
                words = np.frombuffer(f.read(info.n_bytes), np.uint32).reshape(info.shape)
            rows = info.shape[0]
            scales, biases = (read.rows(f"{module}.{kind}", 0, rows) for kind in ("scales", "biases"))
            found[name] = affine(words, scales, biases)
    return found


def affine(words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """uint32 [out, in / 8], float32 [out, in / 64] twice → float32 [out, in]."""
    shifts = np.arange(0, 32, BITS, dtype=np.uint32)
    q = ((words[..., None] >> shifts) & (2**BITS - 1)).reshape(len(words), -1, GROUP).astype(np.float32)
    return (q * scales[..., None] + biases[..., None]).reshape(len(words), -1)


def _rows(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) < 2 else shape[0]
