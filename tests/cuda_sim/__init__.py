"""Real comfy-aimdo without a GPU: a CUDA driver on host memory, and a device for the engine on top of both.

driver/           the driver, in C: memory, streams and events, faults to inject
build.py          compiles it
sim.py            its controls
wheels.py         fetches the comfy-aimdo releases
aimdo.py          loads one of them on the driver
aimdo_device.py   the device that the engine runs on
on_aimdo/         tests that run in a process of their own for each release; test_aimdo.py starts them
demo.py           the demo model on it: `python dev.py sim`
"""

from pathlib import Path

# Compiled and downloaded, never committed.
CACHE = Path(__file__).resolve().parent / "cache"


class Unavailable(RuntimeError):
    """What the simulation needs and this machine does not have."""
