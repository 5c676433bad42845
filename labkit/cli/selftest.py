"""`labkit selftest`: host the kernel's own KVM selftests.

Every guest function that labkit knows is run, on every engine that is asked for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.cli.output import print_json, say
from labkit.cli.waiting import told

if TYPE_CHECKING:
    from labkit.hosts.hosting import Verdict

__all__ = ["ABOUT", "declare", "run"]

ABOUT = "host a folder of kernel selftests"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "folder", type=Path, help="a folder of built kernel selftests (tools/testing/selftests/kvm)"
    )
    parser.add_argument(
        "--backend", default="unicorn", help="engine, or several: unicorn,kvm (default: unicorn)"
    )


def run(args: argparse.Namespace) -> int:
    """A line a binary, function and engine; status 0 when something passes and nothing fails."""
    from labkit.hosts.selftests import HOSTED
    from labkit.hosts.survey import survey

    backends = args.backend.split(",")
    counts = Counter[str]()
    for verdict in told(survey(args.folder, backends, HOSTED), "selftests"):
        counts[verdict.verdict] += 1
        if args.json:
            print_json(asdict(verdict))
        else:
            say(_line(verdict))
    if not args.json:
        print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    passed = counts["passes"] > 0 and counts["fails"] == 0
    return 0 if passed else 1


def _line(verdict: Verdict) -> str:
    columns = (
        f"{verdict.binary:40}",
        f"{verdict.function or '-':28}",
        f"{verdict.backend or '-':8}",
        f"{verdict.verdict:7}",
        verdict.why,
    )
    return " ".join(columns).rstrip()
