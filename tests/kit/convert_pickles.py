"""Convert pickles to safetensors from a terminal.

convert_pickles.py FILE... [--to FOLDER]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.ops.files.disk_map import SourceError
from spillway.ops.files.safetensors_writer import SaveError
from spillway.ops.pickles.convert import convert


def main(arguments):
    folder = None
    if "--to" in arguments:
        at = arguments.index("--to")
        folder, arguments = (arguments[at + 1 : at + 2] or [None])[0], arguments[:at] + arguments[at + 2 :]
        if folder is None:
            arguments = []
    if not arguments:
        print("convert takes the names of .ckpt, .pt, .pth or .bin files, and --to FOLDER.", file=sys.stderr)
        return 2
    failed = 0
    for name in arguments:
        try:
            print(convert(name, folder, progress=shown).words, flush=True)
        except (SourceError, SaveError, OSError) as error:
            print(f"{clear()}{error}", file=sys.stderr)
            failed = 1
    return failed


def shown(done, total):
    if sys.stdout.isatty():
        end = "" if done < total else clear()
        print(f"\r{done * 100 // max(total, 1):3} %{end}", end="", flush=True)


def clear():
    return "\r     \r" if sys.stdout.isatty() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
