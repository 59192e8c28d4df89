"""Published weights from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from slimnas.errors import WeightsError


def download(repository: str, file: str) -> Path:
    """Download one file of a model repository, or find it in the hub's cache.

    Raises:
        WeightsError: not cached and not reachable.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except (OSError, EntryNotFoundError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{repository}: cannot download {file} from huggingface.co ({reason}); connect to "
            "the network, or download it elsewhere and give its path"
        ) from error
