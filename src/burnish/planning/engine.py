"""Which backend, on which device, in which numbers: the decisions that everything else in a plan rests on.

Each function takes what was asked and what is there, and gives a `Choice`; it raises UserError where the
recipe asks for what this machine or model has not.
"""

from __future__ import annotations

from burnish.errors import UserError
from burnish.machine.probe import MLX_CUDA, Machine
from burnish.models.spec import ModelSpec
from burnish.planning.choice import Choice
from burnish.recipe import Recipe

# Dense decoders that mlx-lm has, by the `model_type` of config.json. Only these are given to mlx unasked.
MLX_FAMILIES = (
    "cohere", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"
)  # fmt: skip
# Of those, and of others that mlx-lm has, these let examples of a row touch: they are trained one a row.
MLX_UNPACKED = ("gemma2", "hunyuan_v1_dense")
MLX_PACKAGES = ("mlx", "mlx-lm")
# Apple's recommended working set, as a share of RAM, where it cannot be asked: about 2/3 up to 36 GB, 3/4
# above.
METAL_SHARE_SMALL, METAL_SHARE_LARGE, METAL_LARGE_BYTES = 0.66, 0.75, 36 << 30
MARGIN = {"cpu": 0.10, "cuda": 0.04, "mps": 0.08, "metal": 0.08}
APPLE = ("mps", "metal")  # the Apple GPU: torch's word and mlx's


def choose_backend(recipe: Recipe, spec: ModelSpec, machine: Machine) -> Choice[str]:
    if spec.quantization is not None and recipe.backend in ("torch", "reference"):
        raise UserError(
            f"{spec.folder} is an MLX folder, quantised in {spec.quantization.bits} bits; "
            f"backend {recipe.backend} cannot read it",
            "set backend=mlx, or use the original model",
        )
    if recipe.backend == "mlx":
        _need_mlx(machine, "backend: mlx")
    if recipe.backend == "auto":
        return _auto_backend(recipe, spec, machine)
    if recipe.backend == "reference" and recipe.quantize != "none":
        raise UserError(
            "the reference backend computes in float32 only; it has no quantised base",
            "set quantize=none or backend=torch",
        )
    return Choice(recipe.backend, "as the recipe says")


def _auto_backend(recipe: Recipe, spec: ModelSpec, machine: Machine) -> Choice[str]:
    if spec.quantization is not None:
        _need_mlx(machine, f"{spec.folder} is an MLX folder; it")
        return Choice("mlx", "the folder was quantised by MLX, and only mlx reads it")
    everywhere = Choice("torch", "the backend that trains on every device")
    if not _has(machine, "metal") or recipe.device not in ("auto", *APPLE):
        return everywhere
    if _missing_mlx(machine):
        missing = " and ".join(_missing_mlx(machine))
        return Choice("torch", f"{missing} not installed: pip install 'burnish[mlx]'")
    if spec.model_type not in MLX_FAMILIES:
        return Choice("torch", f"{spec.model_type} is not among the families that mlx is known to train")
    return Choice("mlx", f"Apple's own framework, on an Apple GPU; it is known to train {spec.model_type}")


def _missing_mlx(machine: Machine) -> list[str]:
    return [p for p in MLX_PACKAGES if not machine.versions.get(p)]


def _need_mlx(machine: Machine, what: str) -> None:
    if _missing_mlx(machine):
        raise UserError(
            f"{what} needs mlx and mlx-lm, which are not installed"
            if len(_missing_mlx(machine)) == len(MLX_PACKAGES)
            else f"{what} needs {_missing_mlx(machine)[0]}, which is not installed",
            "pip install 'burnish[mlx]'",
        )


def _has(machine: Machine, kind: str) -> bool:
    return any(g.kind == kind for g in machine.gpus)


def choose_device(recipe: Recipe, backend: str, machine: Machine) -> Choice[str]:
    if backend == "reference":
        if recipe.device not in ("auto", "cpu"):
            raise UserError(
                f"the reference backend runs on the CPU, not on {recipe.device}", "set device=cpu"
            )
        return Choice("cpu", "the reference backend is NumPy")
    apple = "metal" if backend == "mlx" else "mps"
    cuda_part = backend != "mlx" or any(machine.versions.get(p) for p in MLX_CUDA)
    nvidia = _has(machine, "cuda")
    have = {"cuda": nvidia and cuda_part, apple: _has(machine, "metal"), "cpu": True}
    if recipe.device != "auto":
        device = apple if recipe.device in APPLE else recipe.device
        if device == "cuda" and nvidia and not cuda_part:
            raise UserError(
                "device: cuda: this build of mlx has no CUDA",
                "pip uninstall -y mlx-cpu; pip install 'burnish[mlx-cuda]'",  # both own one libmlx.so
            )
        if not have[device]:
            there = ", ".join(d for d, yes in have.items() if yes)
            raise UserError(
                f"device: {recipe.device} is not on this machine; there is: {there}",
                "burnish doctor   shows what this machine has; device=auto takes it",
            )
        said = "" if device == recipe.device else f": {backend} calls the Apple GPU {device}"
        return Choice(device, f"as the recipe says{said}")
    for device, why in (("cuda", "an NVIDIA GPU is here"), (apple, "an Apple GPU is here")):
        if have[device]:
            return Choice(device, why)
    return Choice("cpu", "this build of mlx has no CUDA" if nvidia else "no GPU was found")


def choose_dtypes(
    recipe: Recipe, backend: str, device: str, machine: Machine
) -> tuple[Choice[str], Choice[str]]:
    """The dtype the weights are held in, and the one that is computed in."""
    if backend == "reference":
        if recipe.dtype == "bfloat16":
            raise UserError(
                "the reference backend computes in float32; dtype bfloat16 is not for it", "set dtype=float32"
            )
        exact = Choice("float32", "the reference backend is exact")
        return exact, exact
    if recipe.dtype == "float32":
        asked = Choice("float32", "as the recipe says")
        return asked, asked
    # Its CPU build has no fast bfloat16, whatever the processor has.
    mlx_cpu = backend == "mlx" and device == "cpu"
    native = not mlx_cpu and (machine.cpu_bfloat16 if device == "cpu" else machine.gpu_bfloat16)
    where = "mlx on a CPU" if mlx_cpu else "this CPU" if device == "cpu" else "this GPU"
    if recipe.dtype == "auto" and device == "cpu" and not native:
        plain = Choice("float32", f"{where} has no {'fast ' if mlx_cpu else ''}bfloat16 arithmetic")
        return plain, plain
    held = Choice(
        "bfloat16", "as the recipe says" if recipe.dtype == "bfloat16" else "half of float32's memory"
    )
    if native:
        return held, Choice("bfloat16", f"{where} computes in bfloat16")
    return held, Choice("float32", f"{where} only emulates bfloat16: weights are widened as they are used")


def choose_quantize(recipe: Recipe, spec: ModelSpec, backend: str) -> Choice[str]:
    if spec.quantization is not None:
        there = f"{spec.quantization.bits}bit"
        if recipe.quantize not in ("none", there):
            raise UserError(
                f"quantize: {recipe.quantize}, but {spec.folder} is quantised already, to {there}",
                "leave `quantize` out, or use the original model",
            )
        return Choice(there, "the folder is quantised")
    if recipe.quantize == "8bit" and backend != "mlx":
        raise UserError(
            f"quantize: 8bit is for backend mlx only; this run is planned for {backend}",
            "set quantize=4bit, or backend=mlx",
        )
    return Choice(recipe.quantize, "as the recipe says")


def check_cache_bits(recipe: Recipe, backend: str) -> None:
    bits = recipe.generation.cache_bits
    if bits is not None and backend != "mlx":
        raise UserError(
            f"generation.cache_bits: {bits} is for backend mlx only; this run is planned for {backend}",
            "leave generation.cache_bits out, or set backend=mlx",
        )


def choose_budget(device: str, machine: Machine) -> Choice[int]:
    """Bytes that a run may use of the memory its device has."""
    keep = 1 - MARGIN[device]
    if device == "cuda":
        first = next(g for g in machine.gpus if g.kind == "cuda")  # the one that "cuda" means
        return Choice(int(first.free_bytes * keep), f"free GPU memory less a margin of {MARGIN[device]:.0%}")
    if device in APPLE:
        share = METAL_SHARE_LARGE if machine.ram_bytes > METAL_LARGE_BYTES else METAL_SHARE_SMALL
        working_set = min(int(machine.ram_bytes * share), machine.free_ram_bytes)
        return Choice(
            int(working_set * keep),
            f"Metal's working set ({share:.0%} of RAM, or what is free) less {MARGIN[device]:.0%}",
        )
    return Choice(int(machine.free_ram_bytes * keep), f"free memory less a margin of {MARGIN[device]:.0%}")
