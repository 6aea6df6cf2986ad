"""Chooses who reads from an address. Needs no torch."""

from __future__ import annotations

from .fsspec_store import FsspecStore
from .http_store import HttpStore
from .store import Refused, Store


def open_store(address: str) -> Store:
    """Return the file at an address. Nothing is asked of its place yet. Raises Refused for what is no address."""
    address = address.strip()
    if not address:
        raise Refused("no address was given. Give one such as https://server/model.safetensors or s3://bucket/file.")
    return HttpStore(address) if address.lower().startswith(("http://", "https://")) else FsspecStore(address)
