"""Which addresses may be asked: whoever queues prompts chooses them, and this machine goes there."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, unquote, urlsplit

from .. import settings
from .store import Refused, links_of, without_secrets

VARIABLE = settings.REMOTE.name
# Protocols that lead to a server, and to no file of this machine.
SERVERS = {"http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "cos", "r2"} | {
    *("hf", "smb", "sftp", "ssh", "ftp", "webdav", "webhdfs", "hdfs"),
}
LOGINS = {"http", "https", "ftp", "sftp", "ssh", "smb", "webdav"}
DEFAULT_PORTS = {"http": 80, "https": 443, "sftp": 22, "ssh": 22, "smb": 445, "ftp": 21}


def check_allowed(address: str, only_this_machine_asks: bool) -> None:
    """Raise Refused for an address that the variable does not allow.

    only_this_machine_asks: nobody else reaches this ComfyUI. Else files of this machine are refused, unless the
    variable allows them.
    """
    # What makes no sense allows nothing, and so is not taken for a variable that is not set.
    told = (settings.variable(settings.REMOTE) or "off") if settings.is_set(settings.REMOTE) else ""
    told = told.lower() if told.lower() in ("off", "all") else told
    shown = without_secrets(address)
    if told == "all" or (not told and (only_this_machine_asks or _is_at_a_server(address))):
        return
    if not told:
        raise Refused(
            f"{shown}: this ComfyUI answers to other machines, so whoever asks it is given no files of this one. Start "
            f"it with {VARIABLE}=all, or with what may be asked, such as {VARIABLE}=file:///mnt/models/,https://"
        )
    if told == "off":
        raise Refused(f"{shown}: {VARIABLE} is off here, or is none of what it may be: {settings.REMOTE.expected}.")
    prefixes = [part.strip() for part in told.split(",") if part.strip()]
    if not address.isprintable() or not all(_is_below(link, prefixes) for link in links_of(address)):
        raise Refused(
            f"{shown}: this ComfyUI was started with {VARIABLE}, which does not allow this address. It allows "
            f"{', '.join(map(without_secrets, prefixes))}"
        )


def _is_at_a_server(address: str) -> bool:
    protocol, sign, _ = address.partition("://")
    return bool(sign) and protocol.lower() in SERVERS and len(links_of(address)) == 1


def _is_below(link: str, prefixes: list[str]) -> bool:
    """Say whether an address lies below one of others. What begins with the same letters need not."""
    if ".." in re.split(r"[/\\?#]", unquote(unquote(link))):
        return False
    try:
        asked, *allowed = map(urlsplit, [link, *prefixes])
    except ValueError:  # one that is no address: what makes no sense allows nothing
        return False
    for prefix in allowed:
        if asked.scheme != prefix.scheme:
            continue
        anywhere = not prefix.netloc and not prefix.path  # as https:// alone
        below = asked.path == prefix.path or asked.path.startswith(f"{prefix.path.rstrip('/')}/")
        if anywhere or (_host(asked) == _host(prefix) and below):
            return True
    return False


def _host(parts: SplitResult) -> tuple[str, int | None, str]:
    """Return whom an address leads to. Without a user, whose name may look like a host.

    With what stands before the @ where that is no login: Azure's addresses have the container there.
    """
    user = "" if parts.scheme in LOGINS else parts.netloc.rpartition("@")[0]
    try:
        return (parts.hostname or ""), parts.port or DEFAULT_PORTS.get(parts.scheme), user
    except ValueError:  # no port
        return "\0", None, user
