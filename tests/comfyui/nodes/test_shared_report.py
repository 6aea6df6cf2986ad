"""GET /spillway/memory: one report for all who ask, of after they asked, and the event loop free meanwhile."""

import asyncio
import json
import threading
import time

import pytest

from spillway.nodes import shared_report
from spillway.nodes.shared_report import SharedReport


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(shared_report, "INTERVAL_SECONDS", 0.3)


class Counted:
    """Counts its reports. cost: seconds of the processor that each takes."""

    def __init__(self, cost=0.0):
        self.cost, self.times, self.at_once = cost, [], threading.Lock()

    def __call__(self):
        assert self.at_once.acquire(blocking=False), "two at a time"
        self.times.append(time.monotonic())
        end = time.thread_time() + self.cost
        while time.thread_time() < end:
            pass
        self.at_once.release()
        return {"number": len(self.times)}


async def poll(report, end, asked):
    while time.monotonic() < end:
        before = time.monotonic()
        number = json.loads(await report.get())["number"]
        asked.append((before, number))


def test_ten_who_ask_without_pause_cost_one_report_an_interval():
    made, asked = Counted(), []
    report = SharedReport(made)

    async def run():
        end = time.monotonic() + 1.6
        await asyncio.gather(*(poll(report, end, asked) for _ in range(10)))

    asyncio.run(run())
    assert 3 <= len(made.times) <= 7, "1.6 s, and an interval of 0.3 s"
    assert len(asked) <= 10 * len(made.times)
    assert all(made.times[number - 1] >= before for before, number in asked), "a report of before it was asked for"


def test_who_asks_now_and_then_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(shared_report, "SHARE", 1)  # whatever one costs on a busy machine, the interval is what counts
    sleep, slept = asyncio.sleep, []

    async def noted(seconds):
        slept.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    report = SharedReport(Counted())

    async def run():
        for _ in range(3):
            await report.get()
            await sleep(0.4)

    asyncio.run(run())
    assert len(slept) == 3 and max(slept) <= 0, "seconds that a report was put off"


def test_a_dear_report_is_made_less_often(monkeypatch):
    monkeypatch.setattr(shared_report, "SHARE", 1 / 10)
    made = Counted(cost=0.08)
    report = SharedReport(made)

    async def run():
        end = time.monotonic() + 1.5
        await asyncio.gather(*(poll(report, end, []) for _ in range(10)))

    asyncio.run(run())
    gaps = [after - before for before, after in zip(made.times, made.times[1:], strict=False)]
    assert gaps and min(gaps) >= 0.8


def test_one_that_fails_fails_for_those_who_asked_and_no_more():
    outcomes = [RuntimeError("planted"), {"number": 2}]

    def make():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    report = SharedReport(make)

    async def run():
        first = await asyncio.gather(report.get(), report.get(), return_exceptions=True)
        return first, await report.get()

    failed, text = asyncio.run(run())
    assert [type(error) for error in failed] == [RuntimeError] * 2 and json.loads(text) == {"number": 2}


def test_a_client_that_hangs_up_takes_nothing_from_the_others():
    report = SharedReport(Counted(cost=0.1))

    async def run():
        one, other = asyncio.ensure_future(report.get()), asyncio.ensure_future(report.get())
        await asyncio.sleep(0.02)
        one.cancel()
        return await other

    assert json.loads(asyncio.run(run())) == {"number": 1}


def test_the_loop_is_free_while_a_report_is_made():
    release = threading.Event()
    report = SharedReport(lambda: release.wait(10))

    async def run():
        asked = asyncio.ensure_future(report.get())
        longest, last = 0.0, time.monotonic()
        for _ in range(50):
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        assert not asked.done()
        release.set()
        await asked
        return longest

    assert asyncio.run(run()) < 2
