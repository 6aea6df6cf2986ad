"""Have a file come from an address, until it is whole: fetch_file.py ADDRESS FILE. A test kills this at any moment."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.ops.remote import download
from spillway.ops.remote.fetch import fetch

if os.environ.get("SPILLWAY_PLANTED_FAULT"):
    from kit.planting import VARIABLE, plant

    plant(*json.loads(os.environ[VARIABLE]))

download.SAVE_EVERY = 0.01


def main(address, path):
    coming = fetch(address, path, block_bytes=16 << 10)
    print("began", flush=True)
    if coming is not None:
        coming.wait()
        while not coming.is_whole:
            time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
