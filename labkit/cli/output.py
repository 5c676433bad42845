"""How a command prints: facts as one JSON object a line, words for a person as they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from labkit.outside import printable

__all__ = ["print_json", "say"]


def print_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own, at once: who reads along sees it happen."""
    print(json.dumps(facts), flush=True)


def say(text: str, is_error: bool = False) -> None:
    """Print words for a person, at once; a terminal gets nothing from a guest that it obeys."""
    print(printable(text), file=sys.stderr if is_error else sys.stdout, flush=True)
