"""The hub within reach and out of it: one of a single file here, and resolvers that fail."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from slimnas.data.files import hub_errors
from slimnas.errors import WeightsError
from slimnas.zoo import hub
from slimnas.zoo.create import create_model
from slimnas.zoo.hub import download, hub_in_reach, require_at_hand

CONTENT = bytes(range(256)) * 40
COMMIT = "0123456789" * 4
NOWHERE = "http://127.0.0.1:9"


class Hub(BaseHTTPRequestHandler):
    """Answers for `someone/some` as the hub does for a file that is not in large storage."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(CONTENT)

    def _answer(self, body: bytes) -> None:
        known = self.path == "/someone/some/resolve/main/model.safetensors"
        self.send_response(200 if known else 404)
        if known:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(body if known else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without proxies, with an empty cache, and a hub where nothing listens."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    lead_to(monkeypatch, NOWHERE)


@pytest.fixture
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def lead_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Make `address` the hub's."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("must not be asked")


def test_what_is_in_reach_is_downloaded_and_then_cached(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead_to(monkeypatch, served)
    path = download("someone/some", "model.safetensors")
    assert path.read_bytes() == CONTENT
    with pytest.raises(WeightsError, match="someone/some: cannot download absent from"):
        download("someone/some", "absent")
    lead_to(monkeypatch, NOWHERE)
    monkeypatch.setattr(hub, "hub_in_reach", refuse)  # need not be known of what is cached
    assert download("someone/some", "model.safetensors") == path
    require_at_hand("someone/some", "absent", "model.safetensors")


@pytest.mark.parametrize("proxy", ["http_proxy", "all_proxy", "HTTP_PROXY"])
def test_a_proxy_is_asked_in_the_hub_s_place(
    proxy: str, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not hub_in_reach()
    monkeypatch.setenv(proxy, served)
    assert hub_in_reach()
    lead_to(monkeypatch, served)
    monkeypatch.setenv(proxy, NOWHERE.removeprefix("http://"))
    assert not hub_in_reach()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub_in_reach()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_in_reach()


def test_without_a_network_the_client_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    lead_to(monkeypatch, "https://huggingface.co")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(WeightsError, match=r"\(no answer from https://huggingface\.co") as caught:
        create_model("efficientformer_l1", pretrained=True)
    assert "\n" not in str(caught.value)


def test_a_resolver_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def silent(*arguments: Any, **options: Any) -> Any:
        done.wait(60)
        return []

    lead_to(monkeypatch, "https://huggingface.co")
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(hub, "SECONDS_TO_CONNECT", 0.05)
    began = time.monotonic()
    try:
        assert not hub_in_reach()
        assert time.monotonic() - began < 30
    finally:
        done.set()


def test_offline_by_choice_is_the_client_s_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "hub_in_reach", refuse)
    with pytest.raises(WeightsError, match=r"cannot download model\.safetensors"):
        download("someone/some", "model.safetensors")


def test_a_connection_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = hub_errors()
    assert [error.__name__ for error in errors] == ["OSError", "EntryNotFoundError", "HTTPError"]

    def broken(repository: str, file: str) -> str:
        raise errors[-1]("the peer closed the connection\nand more")

    monkeypatch.setattr(hub, "hub_in_reach", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(WeightsError, match=r"\(the peer closed the connection\); connect"):
        download("someone/some", "model.safetensors")
