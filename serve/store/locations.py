"""Where the record lies when a config does not say so: beside the logs of this server."""

from __future__ import annotations

from pathlib import Path

from deployments.checkpoints.sources import ROOT
from serve.config.settings import StoreSettings
from serve.paths import STATE


def database(store: StoreSettings) -> str:
    """A URL; a file's relative path is taken from the project's root."""
    if store.url is None:
        return f"sqlite:///{STATE / 'dure.sqlite3'}"
    path = store.url.removeprefix("sqlite:///")
    if path == store.url or path.startswith("/") or not path:
        return store.url
    return f"sqlite:///{ROOT / path}"


def assets(store: StoreSettings) -> str:
    if store.assets is None:
        return str(STATE / "assets")
    return store.assets if "://" in store.assets else str(ROOT / Path(store.assets))
