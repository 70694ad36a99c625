"""`remote_facts` against a hub on this machine: what it reads, how little, and what it says if it cannot."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from burnish.models import fetch
from burnish.models.fetch import Hub, remote_facts
from burnish.models.spec import ModelSpec, read_spec
from tests.models.small_hub import SmallHub
from tests.tiny import tiny_model

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12,
    "num_attention_heads": 2, "vocab_size": 10, "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hub") / "model", "qwen2")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, with no setting of this machine's; conftest.py sets every test offline."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_DOMAIN",
                 "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


def at(hub: SmallHub | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and MODELSCOPE_DOMAIN set in a process of its own."""
    address = hub if isinstance(hub, str) else hub.address
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", address)


def remote_spec(name: str, hub: Hub) -> ModelSpec:
    return remote_facts(name, hub)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")}


def safetensors(tensors: dict[str, tuple[str, list[int], int]], data: int | None = None) -> bytes:
    """A file with these tensors: name → dtype, shape, bytes."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\1" * (end if data is None else data)


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_the_spec_is_that_of_the_downloaded_folder(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    with SmallHub({"owner/name": files(folder)}) as small:
        at(small, monkeypatch)
        spec, source = remote_facts("owner/name", hub)
    assert spec == replace(read_spec(folder), folder=Path("owner/name"))
    assert "safetensors headers" in source and fetch.HUBS[hub] in source
    assert {a.revision for a in small.asked} == {"main" if hub == "hf" else "master"}
    assert {a.range for a in small.asked if a.file.endswith(".json")} == {""}
    assert all(a.range for a in small.asked if a.file.endswith(".safetensors"))


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_what_ends_an_answer_is_the_generation_configs(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    config = json.dumps({**CONFIG, "eos_token_id": 3}).encode()
    repo = {"config.json": config, "generation_config.json": b'{"eos_token_id": [7, 3]}'}
    weights = {"model.safetensors": safetensors({"model.norm.weight": ("BF16", [8], 16)})}
    for had in ({**repo, **weights}, repo):  # with headers, and from the config alone
        with SmallHub({"o/n": had}) as small:
            at(small, monkeypatch)
            assert remote_spec("o/n", hub).eos_ids == (7, 3)


def sharded(shards: int, big: int = 0) -> dict[str, bytes]:
    """A model in files, each with a layer's tensors and `big` bytes of data."""
    found: dict[str, bytes] = {"config.json": json.dumps({**CONFIG, "num_hidden_layers": shards}).encode()}
    places = {}
    for i in range(shards):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        found[file] = safetensors({name: ("F8_E4M3" if i else "BF16", [4 + i, 8], big)})
        places[name] = file
    found["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    return found


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_every_file_of_an_index_is_looked_at(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with SmallHub({"o/n": sharded(11)}) as small:
        at(small, monkeypatch)
        spec = remote_spec("o/n", hub)
    assert [spec.tensors[f"model.layers.{i}.self_attn.q_proj.weight"].shape for i in range(11)] == [
        (4 + i, 8) for i in range(11)
    ]
    kinds = {t.dtype for t in spec.tensors.values()}
    assert kinds == {"BF16", "F8_E4M3"} and len({t.file for t in spec.tensors.values()}) == 11


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_weights_are_not_downloaded(knows_ranges: bool, monkeypatch: pytest.MonkeyPatch):
    """Also where the server sends whole files whatever is asked: the connection is closed then."""
    size = 32 << 20
    with SmallHub({"o/n": sharded(2, size)}, knows_ranges=knows_ranges) as small:
        at(small, monkeypatch)
        assert len(remote_spec("o/n", "hf").tensors) == 2
    # what the sockets buffer is sent, too
    assert small.sent_bytes < (1 << 20 if knows_ranges else size), small.sent_bytes


def test_a_header_longer_than_the_first_bytes(monkeypatch: pytest.MonkeyPatch):
    many = {f"model.layers.0.{i:06d}.weight": ("F32", [2, 3], 24) for i in range(2500)}
    file = safetensors(many)
    assert struct.unpack("<Q", file[:8])[0] > fetch.FIRST_BYTES
    for knows_ranges in (True, False):
        repo = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": file}
        with SmallHub({"o/n": repo}, knows_ranges=knows_ranges) as small:
            at(small, monkeypatch)
            assert remote_spec("o/n", "hf").tensors.keys() == many.keys()


def test_nothing_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with SmallHub({"owner/name": files(folder)}) as small:
        at(small, monkeypatch)
        remote_spec("owner/name", "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_token_goes_to_hugging_face_only(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "right")
    with SmallHub({"o/n": files(folder)}, gated=("o/n",)) as small:
        at(small, monkeypatch)
        assert remote_spec("o/n", "hf").n_layers == 3
        assert {a.token for a in small.asked} == {"Bearer right"}
        small.asked.clear()
        small.gated = ()
        assert remote_spec("o/n", "ms").n_layers == 3
        assert {a.token for a in small.asked} == {""}


def test_without_safetensors_files_the_config_tells(folder: Path, monkeypatch: pytest.MonkeyPatch):
    only = {k: v for k, v in files(folder).items() if not k.endswith(".safetensors")}
    with SmallHub({"o/n": only}) as small:
        at(small, monkeypatch)
        spec, source = remote_facts("o/n", "hf")
    found = read_spec(folder)
    assert {k: t.shape for k, t in spec.tensors.items()} == {k: t.shape for k, t in found.tensors.items()}
    assert {t.dtype for t in spec.tensors.values()} == {"BF16"} and "no safetensors files" in source
    stranger = {"config.json": json.dumps({**CONFIG, "model_type": "new"}).encode()}
    with SmallHub({"o/n": stranger}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=r"hf:o/n has no safetensors files, and o/n: .* shapes of a new"):
            remote_spec("o/n", "hf")


def test_where_only_the_weights_are_out_of_reach(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """They lie on servers of their own."""
    with SmallHub({"o/n": files(folder)}, elsewhere={"o/n/model.safetensors": 502}) as small:
        at(small, monkeypatch)
        spec, source = remote_facts("o/n", "hf")
    assert spec.parameters == read_spec(folder).parameters and "out of reach" in source
    stranger = {**sharded(1), "config.json": json.dumps({**CONFIG, "model_type": "new"}).encode()}
    with SmallHub({"o/n": stranger}, elsewhere={"o/n/model-00001-of-00001.safetensors": 502}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match="hf:o/n: the hub answers HTTP 502"):
            remote_spec("o/n", "hf")


# ---- what cannot be had




def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    with SmallHub({}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=r"hf:o/n is not on Hugging Face, or is private") as e:
            remote_spec("o/n", "hf")
        assert "https://huggingface.co/o/n" in e.value.hint and "hf auth login" in e.value.hint
        monkeypatch.setenv("HF_TOKEN", "any")
        with pytest.raises(UserError, match=r"hf:o/n is not on Hugging Face, or is private \(HTTP 404\)"):
            remote_spec("o/n", "hf")
        with pytest.raises(UserError, match=r"ms:o/n is not on ModelScope, or is private") as e:
            remote_spec("o/n", "ms")
        assert "modelscope download --model o/n" in e.value.hint
        assert e.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_gated_model(token: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with SmallHub({"o/n": files(folder)}, gated=("o/n",)) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=r"hf:o/n may be read only by those whom its owner lets") as e:
            remote_spec("o/n", "hf")
        assert "ask for access on https://huggingface.co/o/n, then: hf auth login" in e.value.hint


def test_a_token_that_the_hub_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "unknown")
    with SmallHub({"o/n": files(folder)}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match="hf:o/n: the hub does not know your token") as e:
            remote_spec("o/n", "hf")
    assert "unset HF_TOKEN" in e.value.hint


@pytest.mark.parametrize(("status", "says"), [(429, "too many requests"), (500, "try again later")])
def test_a_hub_that_does_not_answer_now(status: int, says: str, monkeypatch: pytest.MonkeyPatch):
    with SmallHub({"o/n": {}}, elsewhere={"o/n/config.json": status}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=f"hf:o/n: the hub answers HTTP {status}") as e:
            remote_spec("o/n", "hf")
    assert says in e.value.hint and e.value.exit_code == EXIT_FAILED


def unused_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    at(f"http://127.0.0.1:{unused_port()}", monkeypatch)
    with pytest.raises(UserError, match=rf"{fetch.HUBS[hub]} cannot be reached for {hub}:o/n: ConnectE") as e:
        remote_spec("o/n", hub)
    assert ("export HF_ENDPOINT=https://hf-mirror.com" in e.value.hint) == (hub == "hf")
    assert "HTTPS_PROXY=http://HOST:PORT" in e.value.hint and "download" in e.value.hint
    assert e.value.exit_code == EXIT_FAILED


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{unused_port()}")
    at("https://127.0.0.1:1", monkeypatch)
    from huggingface_hub import close_session

    close_session()  # a client reads the proxies when it is made
    try:
        with pytest.raises(UserError, match=r"and the proxy 127\.0\.0\.1:\d+ for hf:o/n") as e:
            remote_spec("o/n", "hf")
    finally:
        close_session()
    assert "secret" not in str(e.value) and "unset HTTPS_PROXY" in e.value.hint


def test_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with SmallHub({"o/n": {}}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as e:
            remote_spec("o/n", "hf")
    assert small.asked == []
    assert "hf download o/n --local-dir ~/models/n, then model=~/models/n" in e.value.hint


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "a b/c", "", "o/n?x=1"])
def test_what_is_no_id(name: str):
    with pytest.raises(UserError, match="is no model id: expected OWNER/NAME"):
        remote_spec(name, "hf")


def page(text: str) -> bytes:
    return text.encode()


@pytest.mark.parametrize(("wrong", "says"), [
    ({"config.json": None}, "hf:o/n has no config.json"),
    ({"config.json": page("<html>")}, "config.json is not JSON"),
    ({"config.json": page("[]")}, "expected a JSON object, got list"),
    ({"config.json": page("{}")}, r"(?s)is not the config of a decoder.*vocab_size is missing"),
    ({"model.safetensors.index.json": page('{"weight_map": {}}')}, "has no weight_map"),
    ({"model-00002-of-00002.safetensors": None}, "names model-00002-of-00002.safetensors, which is not"),
    ({"model-00002-of-00002.safetensors": page("<!DOCTYPE html><p>")}, "is not a safetensors file"),
    ({"model-00002-of-00002.safetensors": page("")}, "HTTP 416|is not a safetensors file"),
    ({"model-00002-of-00002.safetensors": safetensors({"a": ("F4", [1], 1)})}, "dtype that is not known: F4"),
    ({"model-00002-of-00002.safetensors": struct.pack("<Q", 90) + b'{"a":'}, "header is not JSON"),
])
def test_repositories_that_are_not_whole(wrong: dict[str, bytes | None], says: str, monkeypatch: Any):
    repo = {k: v for k, v in {**sharded(2), **wrong}.items() if v is not None}
    with SmallHub({"o/n": repo}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=says) as e:
            remote_spec("o/n", "hf")
    assert "o/n" in e.value.message and e.value.hint


def test_a_file_that_is_far_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "MOST_FILE_BYTES", 1 << 20)
    with SmallHub({"o/n": {"config.json": b" " * (3 << 20)}}) as small:
        at(small, monkeypatch)
        with pytest.raises(UserError, match=r"config.json is more than 1 MiB"):
            remote_spec("o/n", "hf")


def test_hf_endpoint_in_a_process_of_its_own(folder: Path):
    """As a person sets it; and the table's room stays closed to frameworks."""
    code = (
        "import sys; from burnish.models.fetch import remote_facts; "
        "before = 'huggingface_hub' in sys.modules; "
        "spec, _ = remote_facts('o/n', 'hf'); "
        "print(spec.n_layers, before, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    with SmallHub({"o/n": files(folder)}) as small:
        environment = {**os.environ, "HF_ENDPOINT": small.address}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
    assert done.stdout == "3 False []\n", done.stderr
