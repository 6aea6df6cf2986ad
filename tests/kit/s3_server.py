"""An S3 of moto's on this machine. It and the driver s3fs are large: `dev.py test --slow` alone installs them.

Once they are there, every run uses them. Without it they may also lie on PYTHONPATH.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from kit.environment import stamp, stores_folder
from kit.skips import skip_loudly

BUCKET = "shared"


def folder_of_s3():
    """Where s3fs and moto are installed. Skips the test where they are not."""
    folder = stores_folder(sys.executable)
    if stamp(folder) and str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind all else
    found = [importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask", "flask_cors")]
    if None in found:
        skip_loudly("a store in S3: it needs s3fs, moto[s3], flask and flask-cors, which `dev.py test --slow` installs")
    return str(Path(found[0].origin).parents[1])


class S3Server:
    """variables: of the environment of whoever uses it."""

    def __init__(self, log):
        self.folder = folder_of_s3()
        self.log = open(log, "w+b")  # noqa: SIM115 - open as long as the server
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            env={**os.environ, "PYTHONPATH": self.folder, "PYTHONUNBUFFERED": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.address = self._wait(lambda: re.search(r"http://127\.0\.0\.1:\d+", Path(log).read_text()))[0]
        put = urllib.request.Request(f"{self.address}/{BUCKET}", b"", method="PUT")
        self._wait(lambda: urllib.request.urlopen(put, timeout=20).status == 200)
        self.variables = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
            "PYTHONPATH": self.folder,
        }

    def _wait(self, what, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                found = what()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"no S3: {Path(self.log.name).read_text()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()
