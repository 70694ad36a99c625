"""Writing a folder of weights: checked first, filled under a temporary name, put in place whole.

    check_out(source, out, force)
    check_disk(out.parent, needed_bytes, "free some space")
    with replacing(out) as partial:        # out appears, or is replaced, when the block ends well
        write_json(partial / "config.json", config)

Beside it what is needed to write safetensors files from tensors that come one by one: how they
are dealt out to files, and how a file begins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.errors import UserError

SHARD_BYTES = 4 << 30
SPARE_DISK_BYTES = 64 << 20  # tokenizer, configs, the file system's own
MODEL, ADAPTER = "config.json", "adapter_config.json"  # what tells such a folder from others


def check_out(source: Path, out: Path, force: bool, mark: str = MODEL) -> None:
    """Raises UserError where `out` cannot be made, exists (without force), or may not be replaced: it must
    hold the file `mark`, and not the source.
    """
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", f"mkdir -p {out.parent}")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists", "choose another name, or pass --force to replace it")
    # --force replaces a model, never a home folder given by mistake.
    if not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file()):
        kind = {MODEL: "a model", ADAPTER: "an adapter"}.get(mark, "an export")
        raise UserError(
            f"{out} is not {kind} folder (it has no {mark}), so --force does not replace it",
            "choose another name",
        )
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{source} lies inside {out}, which would be replaced", "choose another name for OUT")


def check_disk(folder: Path, needed_bytes: int, hint: str) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{folder} has {free_bytes / 2**30:.1f} GiB free; the model needs {needed_bytes / 2**30:.1f}",
            hint,
            1,
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place at the end; removed where the block raises."""
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, out)
    except BaseException:  # Ctrl-C too: a half-written folder would pass for a whole one
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.replaced"
    if old.exists():  # of a process that was killed
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shards_of(sizes_bytes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name → its tensors, in the order given. One file where all fit in `shard_bytes`; a tensor that is
    larger has a file of its own.
    """
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for name, n_bytes in sizes_bytes.items():
        if groups[-1] and filled_bytes + n_bytes > shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += n_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], total_bytes: int) -> None:
    """Which file holds which tensor, where readers look for it."""
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """How a safetensors file begins. tensors: (name, dtype as 'F32', shape, bytes), in the data's order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, n_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text
