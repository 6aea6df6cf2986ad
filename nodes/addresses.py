"""Which addresses the nodes ask. Whoever reaches this ComfyUI may queue prompts with addresses of their choice."""

from __future__ import annotations

import ipaddress

from comfy.cli_args import args

from ..ops.remote.allowed import check_allowed


def only_this_machine_asks() -> bool:
    """Say whether ComfyUI listens to this machine alone."""
    return all(_is_loopback(host.strip()) for host in str(getattr(args, "listen", "") or "127.0.0.1").split(","))


def check_address(address: str) -> None:
    """Raise Refused for an address that may not be asked."""
    check_allowed(address.strip(), only_this_machine_asks())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
