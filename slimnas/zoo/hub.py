"""Published weights from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from slimnas.data.files import hub_errors
from slimnas.errors import WeightsError

SECONDS_TO_CONNECT = 5.0
SECONDS_PER_ADDRESS = 2.0
_PORTS = {"http": 80, "https": 443}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(repository: str, file: str, *, sha256: str | None = None) -> Path:
    """Download one file of a model repository, or find it in the hub's cache, and check it.

    Its SHA-256 must be `sha256`. Where that is not given it must be the hub's own: the cache names
    large files by it.

    Raises:
        WeightsError: not cached and not reachable, or other content.
    """
    import huggingface_hub

    try:
        require_at_hand(repository, file)
        path = Path(huggingface_hub.hf_hub_download(repository, file))
        _check(path, sha256, what=f"{repository}: {file}")
    except hub_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{repository}: cannot download {file} from huggingface.co ({reason}); connect to "
            "the network, or download it elsewhere and give its path"
        ) from error
    return path


def require_at_hand(repository: str, *files: str) -> None:
    """Refuse within seconds what the hub's own client would try for half a minute to get.

    Args:
        repository: on the hub.
        files: any of which will do.

    Raises:
        ConnectionError: none of `files` is cached, and the hub cannot be reached.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    # Its client refuses at once where the user has forbidden it the network.
    if not constants.HF_HUB_OFFLINE and not hub_in_reach():
        raise ConnectionError(f"no answer from {constants.ENDPOINT} or its proxy")


def hub_in_reach() -> bool:
    """Whether something answers at the hub's host, or at the proxy that leads there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if proxy:
        hub = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return _answers(hub.hostname or "", hub.port or _PORTS.get(hub.scheme, 1080))


def _answers(host: str, port: int) -> bool:
    """Whether a connection can be made; in a thread, for looking up a name has no time limit."""
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            socket.create_connection((host, port), SECONDS_PER_ADDRESS).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    return answered.is_set()


def _check(path: Path, sha256: str | None, *, what: str) -> None:
    stored = path.resolve()
    expected = sha256 or (stored.name if _SHA256.fullmatch(stored.name) else None)
    if expected is None:
        return
    sha = hashlib.sha256()
    with stored.open("rb") as content:
        while block := content.read(1 << 20):
            sha.update(block)
    if sha.hexdigest() != expected:
        raise WeightsError(
            f"{what}: has SHA-256 {sha.hexdigest()}, expected {expected}; delete {stored} and "
            "download it again"
        )
