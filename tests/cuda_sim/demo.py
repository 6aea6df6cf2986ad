"""The demo's model on real comfy-aimdo and a simulated GPU: watch residency follow the memory that others leave.

    python dev.py sim                                       # 2 GB, comfy-aimdo 0.6.0
    python dev.py sim --capacity 1.5GB --version 0.4.13 --steps 9

Between steps other processes take memory from the device and return it. Each line shows what of the model was resident
after a step, by address, and what was streamed in it. The exit status is 0 only if the latents are the plain model's,
bit for bit. Times are those of host memory and say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("MKL_CBWR", "AUTO")  # the same bits wherever a buffer lies
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

import torch

from harness.pack import load_pack

load_pack()

from cuda_sim import Unavailable
from cuda_sim.aimdo import HEADROOM, MIB, Aimdo, load_aimdo
from cuda_sim.aimdo_device import AimdoDevice
from cuda_sim.wheels import VERSIONS
from demo.checkpoint import ensure_checkpoint
from demo.flux import Flux, config_from_keys
from demo.sampling import make_inputs, sample
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.ledger import in_words
from spillway.ops.skip_init import skip_model_initialization
from spillway.patcher.dynamic_model import DynamicModel

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
CELLS = 48
# The share of the model that others leave room for, step by step.
LEFT = (1.0, 0.5, 0.0, 0.25, 0.75, 1.0)


def nbytes(text: str) -> int:
    """Bytes from words such as 2GB or 512MiB."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; expected something like 2GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def bar(model: DynamicModel) -> str:
    """What is resident, from the lowest address to the highest."""
    total = sum(bundle.nbytes for bundle in model.residency.addresses) or 1
    cells, at = [], 0
    for bundle in model.residency.addresses:
        at += bundle.nbytes
        here = bundle.vbar_slice is not None and model.caster.vbar.resident(bundle.vbar_slice)
        cells += ["#" if here else "."] * (at * CELLS // total - len(cells))
    return "".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=nbytes, default=nbytes("2GB"), help="of the device (default 2GB)")
    parser.add_argument(
        "--version", choices=VERSIONS, default=VERSIONS[-1], help="of comfy-aimdo (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=len(LEFT))
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default %(default)s)")
    parser.add_argument("--gb", type=float, default=1.1, help="size of the model made (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="use this Flux.1 file, or write the model there")
    args = parser.parse_args()
    try:
        aimdo = load_aimdo(args.version, args.capacity)
    except Unavailable as reason:
        print(f"cannot simulate: {reason}", file=sys.stderr)
        return 2
    return run(args, aimdo)


def run(args: argparse.Namespace, aimdo: Aimdo) -> int:
    """Denoise under changing pressure, print a line for each step, compare with the plain model."""
    checkpoint = ensure_checkpoint(args.checkpoint, args.gb)
    source, device = DiskMap(checkpoint), AimdoDevice(aimdo.driver, aimdo)
    config = config_from_keys({key: source.spec(key) for key in source.keys()})  # noqa: SIM118 - no mapping
    with skip_model_initialization():
        module = Flux(config).to(torch.bfloat16)
    model = DynamicModel(module, source, backend=device)
    noise, ids, conditioning = make_inputs(config, args.size)
    driver = aimdo.driver

    def leave(step: int) -> int:
        """Others take all but the share of this step; returns what they hold, in bytes."""
        wanted = int(LEFT[step % len(LEFT)] * model.total_bytes)
        others = max(0, args.capacity - HEADROOM - driver.get("allocated") - wanted)
        aimdo.others_take(others)
        return others

    print(f"{checkpoint.name} on {in_words(args.capacity)} with comfy-aimdo {args.version}\n")
    print(f"{'step':>4}  {'others hold':>11}  {'resident':>10}  {'streamed':>10}  {'s':>5}  by address")
    held, streamed, began = leave(0), 0, time.perf_counter()

    def after_step(step: int, latents: torch.Tensor) -> None:
        nonlocal held, streamed, began
        now, seconds = model.ledger.counters.bytes_streamed, time.perf_counter() - began
        words = f"{in_words(held):>11}  {in_words(model.resident_bytes):>10}  {in_words(now - streamed):>10}"
        print(f"{step:>4}  {words}  {seconds:5.1f}  [{bar(model)}]", flush=True)
        held, streamed, began = leave(step), now, time.perf_counter()

    latents = sample(model, noise, ids, conditioning, device="cpu", steps=args.steps, callback=after_step)
    print("\nledger:", *model.ledger.decisions, sep="\n  ")
    model.close()
    device.drop_cached()
    left = {name: value for name, value in driver.leaks().items() if value}

    expected = sample(module, noise, ids, conditioning, device="cpu", steps=args.steps)
    difference = float((latents - expected).abs().max())
    peak = in_words(driver.get("peak") // MIB * MIB)
    print(f"\nlargest difference from the plain model: {difference:g}")
    print(f"peak of the device: {peak}; left behind: {left or 0}")
    if difference or left or driver.get("illegal"):
        print("FAILED: the latents differ, or something was left behind", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
