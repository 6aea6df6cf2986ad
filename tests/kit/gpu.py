"""`dev.py gpu`: test a real GPU, or the fake one, and measure on it. One JSON file, and a table for an issue.

Imports the standard library alone, as dev.py does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .environment import ROOT, fail, say, test_environment, venv_python

PROCESSES = Path(__file__).parent / "processes"
FAKE_DEVICE = ROOT / "tests" / "fake_device"
PARTS = ("check", "engine", "comfyui", "bench")
NONE_HERE = 2

# Of each benchmark: arguments for a card, and for the short form; None where that leaves it out.
BENCHMARKS: dict[str, tuple[list[str], list[str] | None]] = {
    "card": ([], None),
    "comfyui_loader": (
        ["--hidden", "3072", "--size", "1024"],
        ["--hidden", "256", "--size", "64", "--starts", "1", "--rounds", "2"],
    ),
    "offload_peers": (
        ["--gb", "6", "--size", "1024", "--starts", "1"],
        ["--only", "Spillway", "--gb", "0.1", "--size", "64", "--starts", "1", "--rounds", "2"],
    ),
}
# The tests in ComfyUI, with dynamic VRAM and in 16 bit.
FOLDERS = ("loading", "patcher", "patches", "nodes", "saving", "gguf", "int8", "quantise", "cache")
AS_USERS_HAVE_IT = [f"tests/comfyui/{folder}" for folder in FOLDERS]
# Those of the short form.
SHORT = ["tests/comfyui/patcher/test_first_use.py", "tests/comfyui/nodes/test_self_test.py"]


class Command(NamedTuple):
    """A process: what it is called, its arguments and its environment."""

    title: str
    command: list[str]
    environment: dict[str, str]


class Suites(NamedTuple):
    """Make the commands of the tests, by name, from pytest's arguments. comfyui: none where there is no ComfyUI."""

    engine: Callable[[list[str]], dict[str, Command]]
    comfyui: Callable[[list[str]], dict[str, Command]]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py gpu", description="Test the GPU of this machine and measure on it.")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--short", action="store_true", help="small models and few tests in ComfyUI")
    parser.add_argument("--fake", action="store_true", help="on the fake device of tests/fake_device, short")
    parser.add_argument("--json", type=Path, help="the result file (default: output/gpu-DATE.json)")
    return parser.parse_args(arguments)


def main(arguments: list[str], suites: Suites) -> int:
    """Run the parts that are asked for. Returns 0 where all is well, 1 where something is wrong, 2 without a GPU."""
    args = parse(arguments)
    environment = test_environment()
    if args.fake:
        if not FAKE_DEVICE.is_dir():
            return fail("--fake needs tests/fake_device, which this checkout does not have.", NONE_HERE)
        environment.update(SPILLWAY_FAKE_CUDA="1", SPILLWAY_TEST_DEVICE="cuda:0")
    found = ask("find_device.py", environment)
    if "device" not in found:
        why = found.get("none") or found["failed"]
        return fail(
            f"there is no GPU to test: {why} (in .venv). With a card here, SPILLWAY_TORCH names a torch that was built "
            "for it. `dev.py gpu --fake` runs a short form on a fake device.",
            NONE_HERE,
        )
    environment["SPILLWAY_TEST_DEVICE"] = found["device"]
    result = run_parts(args, suites, found, environment)
    path = args.json or ROOT / "output" / f"gpu-{datetime.date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(result)}\n\nfigures: {path}", flush=True)
    return 0 if result["ok"] else 1


def run_parts(
    args: argparse.Namespace, suites: Suites, found: dict[str, Any], environment: dict[str, str]
) -> dict[str, Any]:
    wanted, short = args.only or PARTS, args.short or args.fake
    result: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": "python dev.py gpu" + " --fake" * args.fake + " --short" * args.short,
        **found,
    }
    if "check" in wanted:
        say("checks and a small model")
        result["check"] = ask("print_self_report.py", environment)
    if "engine" in wanted:
        only = ["tests/gpu"] if short else []
        result["engine"] = run_suite(suites.engine(["-q", *only])["engine"], environment)
    if "comfyui" in wanted:
        command = suites.comfyui(["-q", *(SHORT if short else AS_USERS_HAVE_IT)]).get("comfyui")
        if not args.fake:
            environment = {**environment, "SPILLWAY_TEST_AIMDO": "1"}
        result["comfyui"] = {"failed": "no ComfyUI was found"} if command is None else run_suite(command, environment)
    if "bench" in wanted:
        result["bench"] = {
            name: run_benchmark(name, [*arguments, "--device", found["device"]], environment)
            for name, of_a_form in BENCHMARKS.items()
            if (arguments := of_a_form[short]) is not None
        }
    parts = [result[part] for part in ("check", "engine", "comfyui") if part in result]
    parts += result.get("bench", {}).values()
    result["ok"] = all(part.get("ok", "failed" not in part) for part in parts)
    return result


# The parts


def ask(process: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run one of `processes` and return what it prints as JSON in its last line, or its last words as `failed`."""
    command = [str(venv_python()), str(PROCESSES / process)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": f"{process} ended with code {done.returncode}: {words}"}


def run_suite(command: Command, environment: dict[str, str]) -> dict[str, Any]:
    """Run tests on the device, show what they print, and count."""
    say(f"{command.title}, on {environment['SPILLWAY_TEST_DEVICE']}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run(
            [*command.command, f"--junitxml={report}"], cwd=ROOT, env={**environment, **command.environment}
        ).returncode
        counts = counted(report)
    return {"ok": code == 0, "code": code, "seconds": round(time.monotonic() - began, 1), **counts}


def counted(report: Path) -> dict[str, Any]:
    """Return how many tests passed, were skipped and failed, and the names of those that failed."""
    counts: dict[str, Any] = {"passed": 0, "skipped": 0, "failures": []}
    if not report.is_file():
        return {**counts, "failed": "pytest wrote no report"}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def run_benchmark(name: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    say(f"benchmark {name} {' '.join(arguments)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        script = ROOT / "benchmarks" / f"{name}.py"
        command = [str(venv_python()), str(script), *arguments, "--json", str(path)]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code or not path.is_file():
            return {"failed": f"{name} ended with code {code}"}
        return dict(json.loads(path.read_text(encoding="utf-8")))


# The table


def table(result: dict[str, Any]) -> str:
    """Give the result as Markdown."""
    check = result.get("check", {})
    rows = [("device", check.get("identity") or f"{result['device']}, torch {result['torch']}")]
    rows.append(("date, command", f"{result['date']}, `{result['command']}`"))
    if "check" in check:
        failed = [f"**{name} FAILED**: {words}" for name, words in check["check"]["failed"].items()]
        failed += [f"{name} not run: {words}" for name, words in check["check"]["not_run"].items()]
        passed = f"passed in {check['check']['seconds']} s: {', '.join(check['check']['passed'])}"
        rows.append(("check before first use", "; ".join([passed, *failed])))
        for run in check["model"]:
            bits = "the plain bits" if run["same_bits"] else "**OTHER BITS**"
            words = f"{bits}, {1e3 * run['step_s']:.1f} ms a step, {run['streamed_bytes'] / 1e6:.0f} MB streamed"
            rows.append((f"small model at {run['share']:.0%}, {run['vbar']} VBAR", words))
    elif "failed" in check:
        rows.append(("check before first use", f"**{check['failed']}**"))
    for part, name in (("engine", "engine's tests"), ("comfyui", "tests in ComfyUI")):
        if part in result:
            rows.append((name, suite_words(result[part])))
    for name, figures in result.get("bench", {}).items():
        if "failed" in figures:
            rows.append((name, f"**{figures['failed']}**"))
        else:
            rows += [(f"{name}: {who}", bench_words(row)) for who, row in figures["results"].items()]
    lines = ["| | |", "| --- | --- |", *(f"| {left} | {right} |" for left, right in rows)]
    return "\n".join(lines)


def suite_words(part: dict[str, Any]) -> str:
    if "failed" in part:
        return f"**{part['failed']}**"
    words = f"{part['passed']} passed, {part['skipped']} skipped in {part['seconds']:.0f} s"
    failures = part["failures"]
    return f"{words}, **{len(failures)} failed**: {', '.join(failures[:5])}" if failures else words


def bench_words(row: dict[str, Any]) -> str:
    """Word a contestant's row of any benchmark."""
    if "failed" in row:
        return f"did not run: {row['failed']}"
    ready = row.get("ready_s") if isinstance(row.get("ready_s"), float) else row.get("ready_median_s")
    ready = row["load_s"] + row["first_step_s"] if ready is None else ready
    step = row.get("step_median_s", row.get("step_s", row.get("steps_s")))
    ratio = row.get("step_ratio", row.get("steps_s_ratio", row.get("to_limit")))
    words = f"load and first step {ready:.2f} s, later steps {step:.3f} s"
    words += "" if ratio is None else f" (ratio {ratio:.2f})"
    used = row.get("peak_device_bytes")
    return words + ("" if used is None else f", {used / 1e6:,.0f} MB of device memory")


if __name__ == "__main__":
    sys.exit("run `python dev.py gpu`")
