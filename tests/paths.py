"""Where things are in the repository, for tests in any folder."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
GUESTS = REPO / "data" / "guests"  # prebuilt guests and their sources
