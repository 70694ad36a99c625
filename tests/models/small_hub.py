"""A hub on this machine: the routes of Hugging Face and of ModelScope that files are read from.

    with SmallHub({"owner/name": {"config.json": b"…"}}) as hub:
        hub.address, hub.asked         # 'http://127.0.0.1:…', one `Asked` a request
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

_HF = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_MS = re.compile(r"/api/v1/models/([^/]+/[^/]+)/repo")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True)
class Asked:
    repo: str
    revision: str
    file: str
    range: str  # the header, '' for the whole file
    token: str  # the authorization header


@dataclass
class SmallHub:
    """repos: OWNER/NAME → file → its bytes. gated: repos that need the token 'right'; 'unknown' is nobody's.
    elsewhere: repo/file → the status that it answers with. knows_ranges: false sends whole files, whatever is
    asked for.
    """

    repos: Mapping[str, Mapping[str, bytes]]
    gated: tuple[str, ...] = ()
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", "master")
    knows_ranges: bool = True
    asked: list[Asked] = field(default_factory=list)
    sent_bytes: int = 0

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _answer(hub, self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer(hub: SmallHub, request: BaseHTTPRequestHandler) -> None:
    url = urlsplit(request.path)
    at_hf, at_ms = _HF.fullmatch(url.path), _MS.fullmatch(url.path)
    if at_hf:
        repo, revision, file = at_hf.groups()
    elif at_ms:
        query = parse_qs(url.query)
        repo, revision, file = at_ms[1], query["Revision"][0], query["FilePath"][0]
    else:
        return _send(hub, request, 500, b"", {})
    token, asked = request.headers.get("authorization", ""), request.headers.get("range", "")
    hub.asked.append(Asked(repo, revision, file, asked, token))
    status, code = _status(hub, repo, revision, file, token)
    if at_hf and token == "Bearer unknown":
        said = "Invalid credentials in Authorization header"
        return _send(hub, request, 401, b"", {"X-Error-Message": said})
    if status != 200:  # only Hugging Face has words for it
        return _send(hub, request, status, b"", {"X-Error-Code": code} if code and at_hf else {})
    body = hub.repos[repo][file]
    wanted = _RANGE.fullmatch(asked)
    if wanted and hub.knows_ranges:
        first, last = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
        part = body[first : last + 1]
        return _send(hub, request, 206, part, {"Content-Range": f"bytes {first}-{last}/{len(body)}"})
    return _send(hub, request, 200, body, {})


def _status(hub: SmallHub, repo: str, revision: str, file: str, token: str) -> tuple[int, str]:
    if repo not in hub.repos:
        return (404, "RepoNotFound") if token else (401, "RepoNotFound")  # as Hugging Face does
    if repo in hub.gated and token != "Bearer right":
        return 403 if token else 401, "GatedRepo"
    if f"{repo}/{file}" in hub.elsewhere:
        return hub.elsewhere[f"{repo}/{file}"], ""
    if revision not in hub.revisions:
        return 404, "RevisionNotFound"
    return (200, "") if file in hub.repos[repo] else (404, "EntryNotFound")


def _send(
    hub: SmallHub, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]
) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    try:
        for at in range(0, len(body), 1 << 16):
            request.wfile.write(body[at : at + (1 << 16)])
            hub.sent_bytes += len(body[at : at + (1 << 16)])
    except (BrokenPipeError, ConnectionResetError):  # who asked has read enough
        request.close_connection = True
