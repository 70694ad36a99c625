"""Backends: what trains. `open(plan)` opens the one that a plan names; nothing else imports a framework."""

from __future__ import annotations

import importlib
from types import ModuleType

from burnish.backends.base import Learner
from burnish.errors import UserError
from burnish.machine.blas import use_openblas
from burnish.planning.plan import Plan


def open(plan: Plan) -> Learner:
    """Load the model with a fresh adapter and an optimizer, as the plan says. Takes seconds to minutes.

    Raises UserError where the backend is not installed, Unsupported where it cannot train this model.
    """
    name = plan.backend.value
    if name == "reference":
        from burnish.backends.reference import open_reference

        return open_reference(plan)
    if name == "torch":
        try:
            from burnish.backends.torch.load import open_torch
        except ModuleNotFoundError as e:
            if e.name not in ("torch", "transformers", "peft"):
                raise
            raise UserError(
                f"the torch backend needs {e.name}, which is not installed", f"pip install {e.name}"
            ) from e
        return open_torch(plan)
    if name == "mlx":
        return mlx_part("load").open_mlx(plan)
    raise UserError(f"there is no backend {name!r} in this version", "set backend=torch")


def check(plan: Plan) -> None:
    """Raises UserError or Unsupported, as `open` would, where that is known before a weight is read."""
    if plan.backend.value == "mlx":
        mlx_part("load").check_model(plan)


def mlx_part(name: str) -> ModuleType:
    """A module of `backends.mlx`, such as 'load'. Raises UserError where mlx or mlx-lm is not installed."""
    use_openblas()
    try:
        return importlib.import_module(f"burnish.backends.mlx.{name}")
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("mlx", "mlx_lm"):
            raise
        raise UserError(
            f"the mlx backend needs {package}, which is not installed", "pip install 'burnish[mlx]'"
        ) from e
