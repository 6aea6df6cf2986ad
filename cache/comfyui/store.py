"""The shared store in ComfyUI: where it is, and how much of it is used, as the settings say."""

from __future__ import annotations

from typing import Any

from ...ops.ram.available import available_ram
from ..store.shared_store import SharedStore
from . import settings
from .disk import outdated

# The one that was made last. It knows whether its place answers, also where the executor makes a new cache.
_last: SharedStore | None = None


def make_store(ledger: Any, former: SharedStore | None = None) -> SharedStore | None:
    """Make the store of the settings. None where it is off, as it is by default.

    former: the last prompt's, which knows whether its place answers. It stays where nothing was set anew.
    """
    # All settings are looked at, so that one that makes no sense is named also while the store is off.
    options = settings.store_options()
    if options is None:
        return None
    what = outdated()
    if what is not None:
        ledger.decide_once(f"off until the next start, as {what} have changed since this one")
        return None
    global _last
    for one in (former, _last):
        if one is not None and one.options == options:
            return one
    store = _last = SharedStore(options, ledger, room=lambda: available_ram().available)
    sealed = "sealed with a key" if options.key else "not sealed, so whoever may write there is trusted"
    ledger.decide(f"{store.place}: outputs that took {options.least_seconds:g} s or more are shared, {sealed}")
    return store
