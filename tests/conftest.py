"""What every test run needs, and a file that several tests read."""

import pack  # noqa: F401 - the pack is importable as `spillway` from here on
import pytest
from loud import pytest_terminal_summary  # noqa: F401 - what could not run is said at the end


@pytest.fixture
def path(tmp_path):
    """The file of a Stack of DEPTH layers. Test files whose models are others have a `path` of their own."""
    from nets import DEPTH, Stack, write  # not before the host tests have set torch up

    path = tmp_path / "m.safetensors"
    write(path, Stack(DEPTH))
    return path
