"""llama.cpp behind the face of a consumer: what it is asked, what it refuses, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from burnish.errors import UserError
from burnish.export.gguf import write_gguf, write_gguf_adapter
from burnish.export.llama import open_llama
from tests.export.gguf_world import IDS, Tuned, tuned

pytestmark = pytest.mark.llama
CHAT = [{"role": "system", "content": "answer"}, {"role": "user", "content": "the question, don't 12?"}]


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'burnish[gguf]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tuned(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(made: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "m.gguf"
    write_gguf(made.merged, made.source, path, "f32")
    return path


def test_scores_of_any_length_agree(file: Path):
    """One token, a batch less and more than 128, and prefixes of each other."""
    consumer = open_llama(file)
    whole = consumer.score(IDS)
    assert whole.dtype == np.float32 and whole.shape == (len(IDS) - 1,) and (whole < 0).all()
    for length in (2, 3, 127, 128, 129, 130):
        np.testing.assert_allclose(consumer.score(IDS[:length]), whole[: length - 1], atol=1e-4)
    assert consumer.score(IDS[:1]).shape == consumer.score([]).shape == (0,)
    consumer.close()


def test_greedy_is_transformers_own(made: Tuned, file: Path):
    import torch

    with torch.no_grad():
        wanted = (
            made.live()
            .generate(
                torch.tensor([IDS[:140]]),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, 140:]
            .tolist()
        )
    consumer = open_llama(file)
    assert consumer.greedy(IDS[:140], 20, ()) == wanted
    stop = wanted[7]
    assert consumer.greedy(IDS[:140], 20, (stop,)) == wanted[: wanted.index(stop)]
    assert consumer.greedy(IDS[:140], 0, ()) == []
    consumer.close()


def test_prompt_tokens_and_metadata(made: Tuned, file: Path):
    consumer = open_llama(file)
    tokenizer = made.source.tokenizer
    assert consumer.prompt(CHAT) == tokenizer.encode(tokenizer.chat(CHAT, ask=True))
    assert consumer.tokens("a<|im_end|> b") == tokenizer.encode("a<|im_end|> b")
    assert consumer.tokens("") == []
    long = "the model answers the question " * 400
    assert consumer.tokens(long) == tokenizer.encode(long)
    assert consumer.metadata["tokenizer.chat_template"] == tokenizer.template
    assert consumer.metadata["llama.rope.freq_base"] == "50000.000000"
    consumer.close()
    consumer.close()


def test_a_long_template_is_read_whole(made: Tuned, tmp_path: Path):
    long = "{# " + "long " * 4000 + "#}" + made.source.tokenizer.template
    source = replace(made.source, tokenizer=made.source.tokenizer.with_template(long))
    write_gguf(made.merged, source, tmp_path / "m.gguf", "f32")
    consumer = open_llama(tmp_path / "m.gguf")
    assert consumer.metadata["tokenizer.chat_template"] == long
    consumer.close()


def test_no_chat_template_and_one_that_refuses(made: Tuned, tmp_path: Path):
    for template, match in (
        ("", "holds no chat template"),
        ("{{ raise_exception('no system') }}", "no system"),
    ):
        source = replace(made.source, tokenizer=made.source.tokenizer.with_template(template), chat=False)
        write_gguf(made.merged, source, tmp_path / "m.gguf", "f32")
        consumer = open_llama(tmp_path / "m.gguf")
        with pytest.raises(UserError, match=match):
            consumer.prompt(CHAT)
        consumer.close()


def test_a_token_that_is_none(file: Path):
    consumer = open_llama(file)
    for wrong in (280, -1):
        with pytest.raises(UserError, match=f"token {wrong} is not one of the 280"):
            consumer.score([5, wrong, 6])
    assert consumer.score([5, 6]).shape == (1,)  # it lives on
    consumer.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_broken_file(share: float, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    whole = file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"llama\.cpp does not load .*m\.gguf: \w+") as e:
        open_llama(tmp_path / "m.gguf")
    assert e.value.hint
    assert "it said nothing" not in e.value.message
    said = capfd.readouterr()
    assert said.out == said.err == ""  # its own words are in the error, not on the screen


def test_no_file(tmp_path: Path):
    with pytest.raises(UserError, match="is not a file"):
        open_llama(tmp_path / "no.gguf")


def test_an_adapter_of_another_model(file: Path, tmp_path: Path):
    other = tuned(tmp_path / "run", "qwen2")
    write_gguf_adapter(other.source, tmp_path / "lora.gguf")
    with pytest.raises(UserError, match=r"does not load .*lora\.gguf: .*arch"):
        open_llama(file, tmp_path / "lora.gguf")


def test_nothing_is_printed(file: Path, capfd: pytest.CaptureFixture[str]):
    consumer = open_llama(file)
    consumer.score(IDS[:5])
    consumer.greedy(IDS[:5], 3, ())
    consumer.close()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_without_the_extra(file: Path):
    code = (
        "import sys; sys.modules['llama_cpp'] = None; from pathlib import Path;"
        "from burnish.errors import UserError; from burnish.export.llama import open_llama\n"
        "try:\n    open_llama(Path(sys.argv[1]))\nexcept UserError as e:\n    print(e.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert "burnish[gguf]" in done.stdout


def test_importing_the_writer_loads_no_framework():
    code = (
        "import sys, burnish.export.gguf, burnish.export.llama\n"
        "print([m for m in ('torch', 'transformers', 'mlx', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
