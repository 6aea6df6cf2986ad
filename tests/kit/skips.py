"""What must not be overlooked in a test run: the parts that could not run here."""

import pytest

notes = []


def skip(reason):
    """Skip a test, and say so at the end of the run."""
    bar = "!" * 88
    note = "\n".join([bar, *(f"!!  {line}" for line in f"DID NOT RUN: {reason}".splitlines()), bar])
    if note not in notes:
        notes.append(note)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter):
    for note in notes:
        terminalreporter.write_line(note)
