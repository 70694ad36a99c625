"""Folders and files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from burnish.errors import EXIT_FAILED, UserError

PREFIX = ".tmp-"


def write_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `final`, then put it in its place; an older one is replaced.

    Raises UserError where the disk is full or may not be written; nothing is left behind then.
    """
    temporary = final.parent / f"{PREFIX}{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        _swap(temporary, final)
    except (OSError, SafetensorError) as e:
        raise sentence(e, final) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(final.parent)


def write_text(final: Path, text: str) -> None:
    """The same for one text file."""
    temporary = final.parent / f"{PREFIX}{final.name}"
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(final)
    except OSError as e:
        raise sentence(e, final) from e
    finally:
        temporary.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # some network volumes have no fsync for folders
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _swap(temporary: Path, final: Path) -> None:
    """A folder cannot be renamed over another; the old one steps aside first and is removed last."""
    aside = final.parent / f"{PREFIX}old-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def sentence(error: Exception, final: Path) -> UserError:
    """Why `final` could not be written, for people."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if (
        number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or "No space left" in text
        or "File too large" in text
    ):
        return UserError(
            f"the disk is full: {final} could not be written, and nothing of it was left behind",
            "free some space, then the same command with --resume",
            EXIT_FAILED,
        )
    if (
        number in (errno.EACCES, errno.EPERM, errno.EROFS)
        or "Permission denied" in text
        or "Read-only" in text
    ):
        return UserError(
            f"{final} may not be written: {text}", "choose another place with --out DIR", EXIT_FAILED
        )
    hint = "choose another place with --out DIR"
    return UserError(f"{final} could not be written: {text}", hint, EXIT_FAILED)
