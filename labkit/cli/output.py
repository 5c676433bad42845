"""How a command prints: facts as one JSON object a line, words for a person as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["print_json"]


def print_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own, at once: who reads along sees it happen."""
    print(json.dumps(facts), flush=True)
