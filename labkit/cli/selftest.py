"""`labkit selftest`: host the kernel's own KVM selftests, every guest function that labkit knows, on every engine."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "host a folder of kernel selftests"
    parser: argparse.ArgumentParser = commands.add_parser(
        "selftest", help=about, description=__doc__
    )
    parser.add_argument(
        "folder", type=Path, help="a folder of built kernel selftests (tools/testing/selftests/kvm)"
    )
    parser.add_argument(
        "--backend", default="unicorn", help="engine, or several: unicorn,kvm (default: unicorn)"
    )
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    """A line a binary, function and engine; status 0 when something passes and nothing fails."""
    from labkit.hosts.selftests import HOSTED
    from labkit.hosts.survey import survey

    counts = Counter[str]()
    for verdict in survey(args.folder, args.backend.split(","), HOSTED):
        counts[verdict.verdict] += 1
        if args.json:
            print(json.dumps(asdict(verdict)), flush=True)
        else:
            what = f"{verdict.binary:40} {verdict.function or '-':28} {verdict.backend or '-':8} {verdict.verdict:7}"
            print(f"{what} {verdict.why}".rstrip(), flush=True)
    if not args.json:
        print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 0 if counts["passes"] and not counts["fails"] else 1
