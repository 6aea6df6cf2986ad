"""Errors in one line, for logs."""

import pytest

from spillway.ops.ledger import first_line


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("no such file\nadvice\nmore", "no such file"),
        (
            "backend='inductor' raised:\n  CppCompileError: no g++\n\nSet TORCHDYNAMO_VERBOSE=1",
            "backend='inductor' raised: CppCompileError: no g++",
        ),
        ("it ends here:", "it ends here:"),
        ("", "ValueError"),
    ],
)
def test_an_error_is_said_in_a_line_with_its_reason(said, line):
    assert first_line(ValueError(said)) == line
