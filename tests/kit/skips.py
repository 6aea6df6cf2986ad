"""Skip a test so that nobody overlooks it: the end of the run repeats the reason."""

import pytest

reasons = []


def skip_loudly(reason):
    bar = "!" * 88
    framed = "\n".join([bar, *(f"!!  {line}" for line in f"DID NOT RUN: {reason}".splitlines()), bar])
    if framed not in reasons:
        reasons.append(framed)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter):
    for framed in reasons:
        terminalreporter.write_line(framed)
