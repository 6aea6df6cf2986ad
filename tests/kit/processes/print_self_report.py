"""Print, as JSON, what the self test finds on the device under test."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kit.pack  # noqa: F401 - the pack is importable as `spillway` from here on
from kit.device import device_under_test
from spillway.ops.device.backend import backend_for
from spillway.patcher.self_test import self_test

print(json.dumps(self_test(backend_for(device_under_test()), may_init=True)))
