"""What a model on a hub is, before any of its weights are downloaded: some kilobytes a file, nothing is kept.

    spec, source = remote_facts("Qwen/Qwen2.5-14B-Instruct", "hf")        # or "ms" for ModelScope
    spec.folder                                                           # Path("Qwen/Qwen2.5-14B-Instruct")

config.json says what headers cannot; then only the beginning of each safetensors file is read, where its
header is. The connection is huggingface_hub's, so HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT and proxies
mean what they mean there. huggingface_hub is imported only when something is asked for.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from burnish.errors import EXIT_FAILED, UserError
from burnish.models.geometry import spec_from_config
from burnish.models.spec import (
    ModelSpec,
    TensorInfo,
    decoder_config,
    how_to_get,
    parse_header,
    spec_of_parts,
)

Hub = Literal["hf", "ms"]

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FIRST_BYTES = 128 << 10  # nearly every header is shorter, so that one request is enough
MOST_HEADER_BYTES = 100 << 20  # the format's own limit
MOST_FILE_BYTES = 64 << 20  # of config.json or an index; DeepSeek-V3's index has 9 MB
AT_ONCE = 8  # files asked for at the same time
_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Repo:
    hub: Hub
    name: str  # OWNER/NAME

    def __str__(self) -> str:
        return f"{self.hub}:{self.name}"

    def url(self, file: str) -> str:
        if self.hub == "ms":  # the address that modelscope's own library reads files from
            at = f"Revision=master&FilePath={quote(file, safe='')}"
            return f"{_modelscope()}/api/v1/models/{self.name}/repo?{at}"
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file)


@dataclass(frozen=True)
class _Answer:
    status: int
    code: str  # Hugging Face's word for an error: 'GatedRepo', 'EntryNotFound', …
    said: str  # and its sentence
    body: bytes


class _NotHad(Exception):
    """A file that the hub did not give; `error` is what to tell a person."""

    def __init__(self, error: UserError) -> None:
        super().__init__(error.message)
        self.error = error


def remote_facts(model_id: str, hub: Hub) -> tuple[ModelSpec, str]:
    """The spec of OWNER/NAME on a hub, and a few words on where it comes from: dtypes and shapes from the
    safetensors headers, or from config.json alone (BF16) where those cannot be had. `folder` is the id.

    Raises UserError for an id that is not there, may not be read or is no decoder, and where the hub cannot
    be reached.
    """
    if not _ID.fullmatch(model_id):
        raise UserError(f"{model_id} is no model id: expected OWNER/NAME", "such as Qwen/Qwen2.5-7B-Instruct")
    repo, name = _Repo(hub, model_id), Path(model_id)
    if is_offline():
        raise UserError(
            f"{repo} cannot be looked at: HF_HUB_OFFLINE is set",
            f"unset HF_HUB_OFFLINE, or {how_to_get(repo.name, repo.hub)}",
        )
    try:
        config = decoder_config(_config(repo), name)
        generation = _json_object(repo, "generation_config.json") or {}
    except _NotHad as e:
        raise e.error from e
    try:
        files = _weight_files(repo)
        tensors = _tensors(repo, files)
    except _NotHad as e:  # weights lie on other servers, which not every network lets through
        try:
            spec = spec_from_config(config, name, generation)
        except UserError:
            raise e.error from e
        return spec, f"{HUBS[hub]}'s config.json; its headers were out of reach"
    if not files:
        try:
            spec = spec_from_config(config, name, generation)
        except UserError as e:
            raise UserError(
                f"{repo} has no safetensors files, and {e.message}", "use a copy of the model that has them"
            ) from e
        return spec, f"{HUBS[hub]}'s config.json; it has no safetensors files"
    return spec_of_parts(name, config, tensors, generation), f"{HUBS[hub]}'s config and safetensors headers"


def is_offline() -> bool:
    """As huggingface_hub reads it."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def _modelscope() -> str:
    """As modelscope reads it; an address with http:// is taken as it is."""
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return domain if "://" in domain else f"https://{domain}"


def _config(repo: _Repo) -> dict[str, Any]:
    config = _json_object(repo, "config.json")
    if config is None:
        raise UserError(
            f"{repo} has no config.json, so it is not a model that can be fine-tuned (GGUF files only?)",
            "name the repository that it was made from",
        )
    return config


def _weight_files(repo: _Repo) -> list[str]:
    """By the index, or the one file; empty where the repository has neither."""
    index = _json_object(repo, INDEX)
    if index is None:
        return [SINGLE] if _asked(repo, SINGLE, 8) is not None else []
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{repo}: {INDEX} has no weight_map", "use another copy of the model")
    return sorted({str(file) for file in places.values()})


def _tensors(repo: _Repo, files: Sequence[str]) -> dict[str, TensorInfo]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda file: _header(repo, file), files))
    return {name: info for tensors in found for name, info in tensors.items()}


def _header(repo: _Repo, file: str) -> dict[str, TensorInfo]:
    start = _asked(repo, file, FIRST_BYTES)
    if start is None:
        raise UserError(
            f"{repo} is not complete: {INDEX} names {file}, which is not there", "use another copy"
        )
    n = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else -1
    if not 2 <= n <= MOST_HEADER_BYTES:
        raise UserError(
            f"{repo}: {file} is not a safetensors file: header length {n}",
            "use another copy of the model; a mirror that answers with a page is a common reason",
        )
    if len(start) < 8 + n:
        start = _asked(repo, file, 8 + n) or b""
    return parse_header(start[8 : 8 + n], f"{repo}: {file}", file)[0]


def _json_object(repo: _Repo, file: str) -> dict[str, Any] | None:
    """None where the repository has no such file."""
    text = _asked(repo, file, None)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(
            f"{repo}: {file} is not JSON: {e}",
            "a proxy or mirror that answers with a page is a common reason",
        ) from e
    if not isinstance(value, dict):
        raise UserError(
            f"{repo}: {file}: expected a JSON object, got {type(value).__name__}", "use another copy"
        )
    return value


def _asked(repo: _Repo, file: str, first_bytes: int | None) -> bytes | None:
    """The file, or its first bytes; None where the repository has no such file. Raises _NotHad."""
    # The library raises its HTTP client's types (which client differs by version), and those of the standard
    # library for a proxy or an endpoint that is no address: whatever it is, there was no answer.
    try:
        answer = _get(repo, file, first_bytes)
    except UserError:
        raise
    except Exception as e:
        raise _NotHad(_unreached(repo, e)) from e
    # config.json is read first, so of it alone a 404 can mean the whole repository, and does where the hub
    # has no word for what it misses.
    if answer.status == 404 and (file != "config.json" or answer.code == "EntryNotFound"):
        return None
    if answer.status >= 400:
        raise _NotHad(_refused(repo, answer))
    return answer.body


def _get(repo: _Repo, file: str, first_bytes: int | None) -> _Answer:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="burnish") if repo.hub == "hf" else {}
    most = MOST_FILE_BYTES
    if first_bytes is not None:
        most = first_bytes
        headers |= {"range": f"bytes=0-{first_bytes - 1}", "accept-encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    body = bytearray()
    with get_session().stream("GET", repo.url(file), headers=headers, timeout=timeout) as response:
        if response.status_code >= 400:
            code, said = (response.headers.get(f"X-Error-{word}", "") for word in ("Code", "Message"))
            return _Answer(response.status_code, code, said, b"")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) >= most:  # a server that knows no ranges would send all the weights
                break
    if first_bytes is None and len(body) >= most:
        raise UserError(f"{repo}: {file} is more than {most >> 20} MiB", "use another copy of the model")
    return _Answer(response.status_code, "", "", bytes(body[:most]))


def _refused(repo: _Repo, answer: _Answer) -> UserError:
    """What an answer of 400 and more means."""
    status, code = answer.status, answer.code
    page = (
        f"https://huggingface.co/{repo.name}" if repo.hub == "hf" else f"{_modelscope()}/models/{repo.name}"
    )
    if status == 401 and "credentials" in answer.said.lower():
        return UserError(
            f"{repo}: the hub does not know your token: {answer.said}", "hf auth login, or unset HF_TOKEN"
        )
    if code == "GatedRepo" or status == 403:
        return UserError(
            f"{repo} may be read only by those whom its owner lets (HTTP {status})",
            f"ask for access on {page}, then: hf auth login   (or export HF_TOKEN=…)"
            if repo.hub == "hf"
            else f"ask for access on {page}, then {how_to_get(repo.name, repo.hub)}",
        )
    if status in (401, 404):
        private = "hf auth login" if repo.hub == "hf" else how_to_get(repo.name, repo.hub)
        return UserError(
            f"{repo} is not on {HUBS[repo.hub]}, or is private (HTTP {status})",
            f"compare the name with its page, {page}; for a private model: {private}",
        )
    later = (
        "too many requests; wait a little, or log in: hf auth login" if status == 429 else "try again later"
    )
    return UserError(
        f"{repo}: the hub answers HTTP {status}",
        f"{later}, or {how_to_get(repo.name, repo.hub)}",
        EXIT_FAILED,
    )


def _unreached(repo: _Repo, error: Exception) -> UserError:
    """Why there was no answer, and ways around it."""
    said = next(iter(str(error).strip().splitlines()), "")
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    endpoint = os.environ.get("HF_ENDPOINT") if repo.hub == "hf" else None
    through = f" through HF_ENDPOINT={endpoint}" if endpoint else ""
    proxy = _proxy()
    ways = []
    if proxy:
        through += f" and the proxy {proxy}"
        ways.append("unset HTTPS_PROXY and ALL_PROXY if that proxy is not meant")
    else:
        ways.append("behind a proxy: export HTTPS_PROXY=http://HOST:PORT")
    if endpoint:
        ways.append("unset HF_ENDPOINT, or export HF_ENDPOINT=https://hf-mirror.com")
    elif repo.hub == "hf":
        ways.append("where the hub is slow or closed: export HF_ENDPOINT=https://hf-mirror.com")
    ways.append(f"on a machine with a network: {how_to_get(repo.name, repo.hub)}")
    return UserError(
        f"{HUBS[repo.hub]} cannot be reached{through} for {repo}: {said}", "; ".join(ways), EXIT_FAILED
    )


def _proxy() -> str:
    """Host and port of the proxy that the environment names, without name and password."""
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        if value := os.environ.get(key):
            return urlsplit(value).netloc.rpartition("@")[2] or "that is no address"
    return ""
