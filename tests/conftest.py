"""Set up every test run, and write a file that several tests read."""

import pytest

import kit.pack  # noqa: F401 - the pack is importable as `spillway` from here on
from kit.skips import pytest_terminal_summary  # noqa: F401 - a hook of pytest


@pytest.fixture
def path(tmp_path):
    """The file of a Stack of DEPTH layers. Test files whose models are others have a `path` of their own."""
    from kit.nets import DEPTH, Stack, write  # not before the tests in ComfyUI have set torch up

    path = tmp_path / "m.safetensors"
    write(path, Stack(DEPTH))
    return path
