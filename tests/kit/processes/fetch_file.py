"""Have a file come from an address, until it is whole: fetch_file.py ADDRESS FILE. A test kills this at any moment."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from ops.remote import download
from ops.remote.fetch import fetch

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
