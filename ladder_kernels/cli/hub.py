"""Whether the hub of models can be reached, found out in seconds."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from ladder_kernels.errors import MissingFileError

__all__ = ["check_model", "go_offline_without_hub"]

_TIMEOUT = 5.0
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_DEFAULT = "https://huggingface.co"


def go_offline_without_hub(*names: str | None) -> None:
    """Switch to what the hub's cache holds if a name needs the hub and it cannot be reached.

    The hub's own client would retry for most of a minute, file by file. Call this before
    transformers and the like are imported, which read the switch then.

    Args:
        names: Models and data sets: files and folders that exist, or names on the hub.
    """
    if "HF_HUB_OFFLINE" in os.environ or not any(map(_needs_hub, filter(None, names))):
        return
    if not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _needs_hub(name: str) -> bool:
    path = Path(name).expanduser()
    if not path.exists():
        return True
    try:
        saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
        base = saved.get("base_name_or_path")
    except (OSError, ValueError, AttributeError):
        return False
    return bool(base) and not Path(base).exists() and not (path / base).exists()


def _hub_answers() -> bool:
    """Whether the hub's host, or the proxy on the way to it, takes a connection."""
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", _DEFAULT))
    proxies = urllib.request.getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    through = hub
    if proxy and not urllib.request.proxy_bypass(hub.hostname or ""):
        through = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = through.port or (443 if through.scheme == "https" else 80)
    try:
        with socket.create_connection((through.hostname or "", port), timeout=_TIMEOUT):
            return True
    except OSError:
        return False


def check_model(name: str, gguf_file: str | None = None) -> None:
    """Refuse a model that is neither here nor, as far as can be seen quickly, on the hub.

    Args:
        name: File, folder or hub name.
        gguf_file: A file in the hub's repository.

    Raises:
        MissingFileError: If there is no such file or folder and it cannot be a name on the hub, or
            the hub cannot be reached and the model is not in its cache.
    """
    if Path(name).expanduser().exists():
        return
    if not _HUB_NAME.fullmatch(name):
        raise MissingFileError(f"'{name}' does not exist")
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not try_to_load_from_cache(name, gguf_file or "config.json"):
        raise MissingFileError(
            f"'{name}' is not a folder here, and the hub cannot be reached to look for a model of "
            "that name"
        )
