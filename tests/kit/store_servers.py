"""Servers of this machine for stores: SFTP, SMB (Samba) and Google's storage. Run as a program it is one of them.

Python packages that they need lie where `dev.py test --slow` puts them. Samba is the system's: apt-get install samba.
"""

import asyncio
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

USER, PASSWORD = "me", "secret"
NEEDS = {"sftp": ("asyncssh", "paramiko"), "smb": ("smbprotocol",), "gs": ("gcp_storage_emulator", "gcsfs")}


def sftp(folder, port):
    import asyncssh

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username):
            return True

        def password_auth_supported(self):
            return True

        def validate_password(self, username, password):
            return (username, password) == (USER, PASSWORD)

    async def serve():
        await asyncssh.listen(
            "127.0.0.1",
            port,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            server_factory=Server,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=folder),
        )
        await asyncio.Event().wait()

    asyncio.run(serve())


def gs(_, port):
    from gcp_storage_emulator.server import create_server

    create_server("127.0.0.1", port, in_memory=True, default_bucket="shared").start()
    while True:
        time.sleep(60)


def smb(folder, port):
    """Samba without the system's settings and users. It must be root's, or this user's alone."""
    base = tempfile.mkdtemp(prefix="samba-")
    places = {f"{name} directory": name for name in ("lock", "state", "cache", "pid")}
    places |= {"private dir": "private", "ncalrpc dir": "ncalrpc"}
    told = {
        "smb ports": port,
        "interfaces": "127.0.0.1",
        "bind interfaces only": "yes",
        "disable netbios": "yes",
        "load printers": "no",
        "disable spoolss": "yes",
        "passdb backend": f"smbpasswd:{base}/smbpasswd",
        "log file": f"{base}/log",
    } | {key: f"{base}/{name}" for key, name in places.items()}
    for name in places.values():
        os.mkdir(f"{base}/{name}")
    lines = [f"{key} = {value}" for key, value in told.items()]
    Path(base, "smb.conf").write_text(
        "\n".join(["[global]", *lines, "[share]", f"path = {folder}", "read only = no\n"])
    )
    given = f"{PASSWORD}\n{PASSWORD}\n"
    add = ["smbpasswd", "-c", f"{base}/smb.conf", "-s", "-a", _me()]
    subprocess.run(add, input=given, text=True, check=True, capture_output=True)
    os.execvp("smbd", ["smbd", "-F", "--no-process-group", "-s", f"{base}/smb.conf"])


def _me():
    import getpass

    return getpass.getuser()


class StoreServer:
    """A server of one kind, for a folder of its own. address: of a folder in it. Use it as a context."""

    def __init__(self, kind, folder):
        from kit.environment import stamp, stores_folder
        from kit.skips import skip_loudly

        packages = stores_folder(sys.executable)
        if stamp(packages) and str(packages) not in sys.path:
            sys.path.append(str(packages))  # behind all else
        missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
        if kind == "smb" and shutil.which("smbd") is None:
            missing.append("Samba")
        if missing:
            skip_loudly(f"a store at {kind}://: it needs {' and '.join(missing)} (tests/kit/store_servers.py)")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "cache").mkdir(parents=True)
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, str(folder), str(port)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        where = f"127.0.0.1:{port}"
        self.address = {
            "sftp": f"sftp://{USER}:{PASSWORD}@{where}/cache",
            "smb": f"smb://{_me()}:{PASSWORD}@{where}/share/cache",
            "gs": "gs://shared/cache",
        }[kind]
        self.variables = {"PYTHONPATH": path}  # of whoever uses it
        if kind == "gs":
            self.variables["STORAGE_EMULATOR_HOST"] = f"http://{where}"
        self._wait(port)

    def _wait(self, port, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("no server")

    def stop(self):
        self.process.kill()
        self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


if __name__ == "__main__":
    {"sftp": sftp, "smb": smb, "gs": gs}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
