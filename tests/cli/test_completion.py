"""The shell completes commands and options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEPARATOR = "\v"


def completions(line: str) -> set[str]:
    """What argcomplete offers a shell for a line, as bash asks for it."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": SEPARATOR,
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from labkit.cli import main; main()"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    return {word.strip() for word in done.stdout.split(SEPARATOR)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("labkit ", {"run", "doctor", "selftest", "bench"}),
        ("labkit fr", {"freeze"}),
        ("labkit run --m", {"--memory", "--max-insns"}),
        ("labkit run --protect s", {"sev", "sev-es", "snp"}),
        ("labkit bench e", {"engine", "encryption"}),
    ],
)
def test_that_the_shell_is_told_what_could_come_next(line: str, words: set[str]) -> None:
    assert words <= completions(line)
