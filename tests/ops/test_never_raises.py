"""What ComfyUI calls outside of a node: an error is logged, once for each cause, and something usable is given back."""

import asyncio
import logging
from types import SimpleNamespace

import pytest

from spillway.ops import never_raises as module
from spillway.ops.ledger import Ledger
from spillway.ops.never_raises import never_raises


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch):
    monkeypatch.setattr(module, "_logged", set())


def failing(error):
    raise error


def test_something_usable_is_given_back(caplog):
    @never_raises("the work", lambda owner, number, twice=1: (owner, number * twice))
    def work(owner, number, twice=1):
        raise ValueError("too much\nand a second line")

    assert [work("me", 2, twice=3) for _ in range(3)] == [("me", 6)] * 3
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info[0] is ValueError
    assert "the work failed (ValueError: too much); the server goes on" in record.getMessage()
    assert never_raises("nothing")(lambda: failing(OSError()))() is None
    assert never_raises("no error")(lambda number: number + 1)(1) == 2


def test_other_causes_are_told_too(caplog):
    work = never_raises("the work")(failing)
    for error in (ValueError("a"), ValueError("b"), KeyError("c")):
        work(error)
    assert [record.exc_info[0] for record in caplog.records] == [ValueError, KeyError]


def test_coroutines():
    @never_raises("the work", lambda value: -value)
    async def work(value):
        await asyncio.sleep(0)
        return value if value < 2 else failing(ValueError("large"))

    async def both():
        return [await work(1), await work(2)]

    assert asyncio.run(both()) == [1, -2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
def test_interrupts_and_exits_pass(error):
    with pytest.raises(error):
        never_raises("the work")(failing)(error())
    with pytest.raises(error), never_raises("the work"):
        raise error

    async def work():
        raise error

    with pytest.raises(error):
        never_raises("the work")(work)().send(None)


def test_a_context(caplog):
    with never_raises("a step"):
        raise ValueError("no")
    assert "a step failed (ValueError: no)" in caplog.text


def test_a_nodes_error_is_the_nodes(caplog):
    running = True
    work = never_raises("the work", lambda _: 0, unless=lambda: running)(failing)
    with pytest.raises(ValueError, match="mine"):
        work(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"), never_raises("the work", unless=lambda: running):
        failing(ValueError("mine"))
    assert not caplog.records
    running = False
    assert work(ValueError("nobody's")) == 0 and "nobody's" in caplog.text


def test_the_ledger_of_what_failed_is_told():
    class Owner:
        ledger = Ledger("it")

        @never_raises("the work")
        def work(self):
            raise ValueError("no")

    owner = Owner()
    owner.work()
    owner.work()
    assert list(owner.ledger.decisions) == ["the work failed (ValueError: no); the server goes on without it."]


def test_what_has_no_ledger_to_reach():
    class Broken:
        @property
        def ledger(self):
            raise RuntimeError("gone")

    for owner in (Broken(), SimpleNamespace(ledger="a word"), None):
        never_raises("the work")(lambda owner: failing(ValueError("no")))(owner)


def test_an_error_that_cannot_be_told(caplog):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    assert never_raises("the work", lambda _: 7)(failing)(Mute()) == 7
    assert "the work failed (Mute: Mute)" in caplog.text
