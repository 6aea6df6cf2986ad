"""A hash of a file's content: of all of a small one, of the parts of a large one that differ between two models."""

import os
import random

import pytest

from spillway.cache import content
from spillway.cache.content import content_of

SIZE = 40 << 20


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    os.utime(path, (1000, 1000))
    return path


def look(path):
    return content_of(str(path), os.stat(path))


def write(path, place, data=b"x"):
    """Write in place, and leave size and time as they were."""
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)
    os.utime(path, (1000, 1000))


@pytest.mark.parametrize("place", [0, 500_000, content.FIRST - 1, SIZE - 1, SIZE - 50_000])
def test_header_and_end_are_read_whole(path, place):
    before = look(path)
    write(path, place)
    assert look(path) != before


def test_other_weights_are_another_content(path):
    """They differ everywhere: so a sample sees them, and any part of a mebibyte."""
    seen = {look(path)}
    rng = random.Random(1)
    for number in range(1, 20):
        write(path, rng.randrange(SIZE - (2 << 20)), bytes([number]) * (1 << 20))
        seen.add(look(path))
    assert len(seen) == 20


def test_a_small_file_is_read_whole(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(bytes(content.WHOLE))
    rng, seen = random.Random(2), {look(path)}
    for _ in range(20):
        write(path, rng.randrange(content.WHOLE))
        seen.add(look(path))
    assert len(seen) == 21


def test_it_is_read_once_for_each_state(path, monkeypatch):
    read = []
    whole = content._sample
    monkeypatch.setattr(content, "_sample", lambda *arguments: read.append(arguments) or whole(*arguments))
    monkeypatch.setattr(content, "STATES_TELL", True)
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1.0)
    assert look(path) == look(path) and len(read) == 1
    write(path, 7)
    look(path)
    assert len(read) == 2
    monkeypatch.setattr(content, "SETTLED_SECONDS", 60.0)
    write(path, 7, b"y")
    look(path), look(path)
    assert len(read) == 4, "it was changed just now: the same times may come with another content"


def test_what_is_no_plain_file_has_no_content(tmp_path):
    assert look(tmp_path) == ""
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert look(tmp_path / "pipe") == ""
