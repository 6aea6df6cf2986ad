"""What every test run needs."""

import pack  # noqa: F401 - the pack is importable as `spillway` from here on
from loud import pytest_terminal_summary  # noqa: F401 - what could not run is said at the end
