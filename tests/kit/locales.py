"""The texts of the pack's languages."""

import json

from kit.pack import ROOT

LOCALES = ROOT / "locales"


def texts(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def flat(table, above=""):
    """(key, text) of each text, keys joined by dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield above + key, value
