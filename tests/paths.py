"""Where things are in the repository, for tests in any folder."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
GUESTS = REPO / "data" / "guests"  # prebuilt guests and their sources


def prebuilt_entries(name: str) -> list[str]:
    """The guest functions of a prebuilt guest.

    They are read off its source, which is cheap enough for a list of parameters.
    """
    source = (GUESTS / f"{name}.c").read_text()
    return re.findall(r"^void (guest_\w+)\(", source, re.MULTILINE)
