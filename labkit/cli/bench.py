"""`labkit bench`: labkit's figures on this machine, each against a peer in the same run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from typing import Any

from labkit.errors import NotAvailable

__all__ = ["add"]

GROUPS = ("engine", "architectures", "kvm", "looking", "encryption", "widgets")


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "labkit's figures on this machine"
    parser: argparse.ArgumentParser = commands.add_parser("bench", help=about, description=__doc__)
    parser.add_argument(
        "groups",
        nargs="*",
        choices=[*GROUPS, []],
        default=[],
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)}",
    )
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    kept = True
    for group in args.groups or GROUPS:
        try:
            for result in import_module(f"labkit.bench.{group}").results():
                kept &= result.ok
                _show(result, args.json)
        except NotAvailable as err:
            print(
                json.dumps({"group": group, "not_available": str(err)})
                if args.json
                else f"--  {group}: {err}",
                flush=True,
            )
    return 0 if kept else 1


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(result), "ok": result.ok}), flush=True)
        return
    sign = ">=" if result.at_least else "<="
    print(
        f"{'ok ' if result.ok else 'NOT'} {result.name:<42} {result.value:8.2f} {result.unit:<26} "
        f"(promised {sign} {result.target:g}; {result.note})",
        flush=True,
    )
