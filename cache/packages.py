"""Says which packages this Python has, as what they compute may differ from one version to the next."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress

# What pip leaves beside a package. Its name has the version, and its time is that of the installation, which says more
# of a package that comes from a repository.
RECORDS = (".dist-info", ".egg-info", ".egg-link")


def packages_digest(started: int) -> str | None:
    """Hash names, versions and times of installation. None where any is from after `started`, in ns of 1970.

    A process may run an older version of such a package, or half of each.
    """
    found = set()
    for place in sys.path:
        with suppress(OSError), os.scandir(place or os.curdir) as entries:
            for entry in entries:
                if entry.name.endswith(RECORDS):
                    try:
                        installed = entry.stat().st_mtime_ns
                    except OSError:  # a link to nowhere, which nothing is imported from
                        installed = 0
                    if installed > started:
                        return None
                    found.add(f"{entry.name} {installed}")
    return hashlib.sha256("\n".join(sorted(found)).encode("utf-8", "surrogateescape")).hexdigest()
