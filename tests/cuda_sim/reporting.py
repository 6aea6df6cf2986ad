"""A pytest plugin of the processes that test one comfy-aimdo release: it writes what happens as it happens.

One JSON object a line, so that the last line names the test that was running when a process crashed.
"""

import json
import os

VARIABLE = "SPILLWAY_SIM_REPORT"


def _write(**entry):
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_runtest_logstart(nodeid, location):
    _write(test=nodeid, event="start")


def pytest_runtest_logreport(report):
    text = report.longreprtext if report.failed else ""
    _write(test=report.nodeid, event=report.when, outcome=report.outcome, seconds=report.duration, text=text)


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, event="collect", outcome="failed", seconds=0, text=report.longreprtext)
