"""Fixtures of the tests of saved models. They import ComfyUI when they are used: it may be missing."""

import pytest


@pytest.fixture
def small_parts(monkeypatch):
    """Weights of the small models are large ones: they are made in several parts."""
    from spillway.ops.files import deferred

    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)
