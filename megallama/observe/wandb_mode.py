"""Whether there is a wandb to log to, and whether it can reach its server."""

from __future__ import annotations

import importlib
import netrc
import os
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from megallama.config.errors import UserError
from megallama.config.schema import WandbConfig

INSTALL = "pip install 'megallama[wandb]'"


def find_wandb(config: WandbConfig) -> ModuleType | None:
    """The wandb module; None if it is not wanted, or if `auto` does not find it.

    Raises UserError if a mode that needs it is asked for by name and it is not installed.
    """
    if config.mode == "disabled":
        return None
    try:
        module = importlib.import_module("wandb")
        # Any folder named wandb, such as one with old runs, imports as an empty package.
        found = hasattr(module, "init")
    except Exception:  # a broken installation fails in any way
        found = False
    if found:
        return module
    if config.mode == "auto":
        return None
    raise UserError.one(
        "metrics.wandb.mode",
        f"'{config.mode}' needs wandb, which is not installed: {INSTALL}, or set mode to auto",
    )


def choose_mode(config: WandbConfig, defaults: Any) -> str:
    """online, offline or disabled. `auto` follows $WANDB_MODE; online without a key is offline."""
    wanted: str = config.mode
    if wanted == "auto":
        wanted = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(
            os.environ.get("WANDB_MODE", ""), "online"
        )
    return "offline" if wanted == "online" and not has_key(defaults) else wanted


def has_key(defaults: Any) -> bool:
    """Whether wandb will find credentials for its server: in the environment, settings or netrc.

    `defaults` are wandb's settings after reading its own files and the environment.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if defaults.api_key:
        return True
    hosts = {urlsplit(defaults.base_url).netloc}
    if defaults.base_url == type(defaults)().base_url:
        hosts.add("api.wandb.ai")  # keys of the public server are also found under its first name
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in entries for host in hosts)
