"""Says in which order weights that are still coming into their file will be used."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.files.coming_file import ComingFile, Range
from ..ops.lending.bundle import Bundle


def foresee(order: Sequence[Bundle], soon: bool) -> None:
    """Have what is still missing of the bundles brought in this order. soon: before what other models need.

    Of tables, rows alone are used, so the rest of one comes last.
    """
    ranges: dict[ComingFile, list[Range]] = {}
    for bundle in sorted(order, key=lambda bundle: bundle.by_rows):
        for file, offset, nbytes in bundle.coming:
            if file.coming is not None:
                ranges.setdefault(file.coming, []).append((offset, nbytes))
    for coming, wanted in ranges.items():
        coming.expect(wanted, soon)
