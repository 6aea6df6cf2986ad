"""What goes from a store is old by every clock there is."""

import pytest

from spillway.cache.store.place import Place
from spillway.cache.store.tidy import DAY, Found, going

NOW = 1.7e9


def test_old_entries_go():
    files = [Found("old", NOW - 31 * DAY, 10), Found("young", NOW - 3600, 10)]
    assert going(files, 0, 30, NOW) == files[:1]


def test_a_file_that_is_dated_ahead_takes_nothing_with_it():
    files = [
        Found("young", NOW - 3600, 10),
        Found("being written", NOW - 60, 10, whole=False),
        Found("ahead", NOW + 40 * DAY, 10),
    ]
    assert going(files, 0, 30, NOW) == []


def test_a_clock_that_is_ahead_takes_nothing():
    assert going([Found("young", NOW - 3600, 10)], 0, 30, NOW + 400 * DAY) == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("sftp://user:pa#ss@host/x", "port 'pa#ss' of user:pa#ss@host"),
        ("sftp://user:pa/ss@host/x", "no host user:pa/ss"),
        ("smb://user:pa%20ss@host/x", "refused: pa ss, pa%20ss"),
    ],
)
def test_no_form_of_a_password_is_told(address, said):
    place = Place(address)
    for told in (str(place), place.without_secrets(said)):
        assert "***" in told and not any(word in told for word in ("user", "pa#ss", "pa/ss", "pa ss", "pa%20ss"))
