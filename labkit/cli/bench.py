"""`labkit bench`: labkit's figures on this machine, each against a peer in the same run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from typing import Any

__all__ = ["add"]

GROUPS = ("engine", "looking")


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "labkit's figures on this machine"
    parser: argparse.ArgumentParser = commands.add_parser("bench", help=about, description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=[], metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    kept = True
    for group in args.groups or GROUPS:
        for result in import_module(f"labkit.bench.{group}").results():
            kept &= result.ok
            if args.json:
                print(json.dumps({**asdict(result), "ok": result.ok}), flush=True)
            else:
                sign = ">=" if result.at_least else "<="
                print(f"{'ok ' if result.ok else 'NOT'} {result.name:<38} {result.value:8.2f} {result.unit:<26} "
                      f"(promised {sign} {result.target:g}; {result.note})", flush=True)
    return 0 if kept else 1
