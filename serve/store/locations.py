"""Where the record lies. Unless the config says so, that is beside this server's logs."""

from __future__ import annotations

from pathlib import Path

from deployments.checkpoints.sources import ROOT
from serve.config.settings import StoreSettings
from serve.paths import STATE


def database(store: StoreSettings) -> str:
    """The database's URL; a relative path of a file starts at the project's root."""
    if store.url is None:
        return f"sqlite:///{STATE / 'dure.sqlite3'}"
    path = store.url.removeprefix("sqlite:///")
    if path == store.url or path.startswith("/") or not path:
        return store.url
    return f"sqlite:///{ROOT / path}"


def assets(store: StoreSettings) -> str:
    """The folder or URL of image files; a relative path starts at the project's root."""
    if store.assets is None:
        return str(STATE / "assets")
    return store.assets if "://" in store.assets else str(ROOT / Path(store.assets))
