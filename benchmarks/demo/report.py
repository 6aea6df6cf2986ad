"""The demo's figures as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping


def combine(offloaded: Mapping, full: Mapping, max_abs_diff: float) -> dict:
    """Put both runs into one flat dictionary. Other programs rely on the keys up to ``vbar``."""
    shared = (
        "budget_bytes",
        "peak_resident_bytes",
        "peak_rss_bytes",
        "load_s",
        "first_step_s",
        "step_s",
        "bytes_streamed",
        "faults",
        "evictions",
        "device",
        "vbar",
        "weights_bytes",
        "peak_anonymous_bytes",
        "misses",
        "stalls",
        "steps_s",
        "latents_finite",
    )
    own = ("load_s", "first_step_s", "step_s", "peak_resident_bytes", "peak_rss_bytes", "peak_anonymous_bytes")
    return {
        "max_abs_diff": max_abs_diff,
        **{key: offloaded[key] for key in shared},
        **{f"full_{key}": full[key] for key in own},
    }


def failures(result: Mapping) -> list[str]:
    """Say in words what makes the demo fail; empty when all is well."""
    found = []
    if not result["latents_finite"]:
        found.append("the latents are not finite: the comparison says nothing")
    if result["max_abs_diff"] != 0:  # true of a NaN as well
        found.append(f"the offloaded run differs from the fully loaded one by up to {result['max_abs_diff']:g}")
    if result["peak_resident_bytes"] > result["budget_bytes"]:
        over = result["peak_resident_bytes"] - result["budget_bytes"]
        found.append(f"the resident weights went {over} bytes over the budget")
    return found


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"


def table(offloaded: Mapping, full: Mapping, max_abs_diff: float) -> str:
    """Show both runs side by side."""
    kinds = {
        "load_s": ("load", lambda v: f"{v * 1000:,.0f} ms"),
        "first_step_s": ("first step", lambda v: f"{v:.2f} s"),
        "step_s": ("later steps (median)", lambda v: f"{v:.2f} s"),
        "budget_bytes": ("budget for weights", lambda v: "none" if v is None else megabytes(v)),
        "peak_resident_bytes": ("peak resident", megabytes),
        "bytes_streamed": ("streamed", megabytes),
        "faults": ("faults", lambda v: f"{v:,}"),
        "misses": ("misses", lambda v: f"{v:,}"),
        "evictions": ("evictions", lambda v: f"{v:,}"),
        "stalls": ("stalls", lambda v: f"{v:,}"),
        "peak_rss_bytes": ("peak RSS of the process", megabytes),
        "peak_anonymous_bytes": ("... without mapped files", megabytes),
    }
    lines = [f"{'':<26}{'offloaded':>16}{'fully loaded':>16}"]
    lines += [f"{label:<26}{show(offloaded[key]):>16}{show(full[key]):>16}" for key, (label, show) in kinds.items()]
    lines.append(f"{'largest difference':<26}{max_abs_diff:>16g}")
    return "\n".join(lines)


def figures_for_picture(offloaded: Mapping, full: Mapping, max_abs_diff: float) -> list[tuple[str, str]]:
    """Return labels and values for the panel beside the picture."""
    return [
        ("Weights", megabytes(offloaded["weights_bytes"])),
        ("Budget", megabytes(offloaded["budget_bytes"])),
        ("Peak resident", megabytes(offloaded["peak_resident_bytes"])),
        ("Streamed", megabytes(offloaded["bytes_streamed"])),
        ("Bundles", f"{len(offloaded['residency'][0]):,}"),
        ("Faults", f"{offloaded['faults']:,}"),
        ("Misses", f"{offloaded['misses']:,}"),
        ("Evictions", f"{offloaded['evictions']:,}"),
        ("Load", f"{offloaded['load_s'] * 1000:,.0f} ms"),
        ("First step", f"{offloaded['first_step_s']:.2f} s"),
        ("Later steps", f"{offloaded['step_s']:.2f} s"),
        ("Later steps, all loaded", f"{full['step_s']:.2f} s"),
        ("Largest difference", f"{max_abs_diff:g}"),
        ("Device", offloaded["device"]),
        ("VBAR", offloaded["vbar"]),
    ]
