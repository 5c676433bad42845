"""`labkit bench`: labkit's figures on this machine, each against a peer in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING

from labkit.cli.output import print_json
from labkit.cli.waiting import told
from labkit.errors import NotAvailable

if TYPE_CHECKING:
    from labkit.bench.measure import Result

__all__ = ["ABOUT", "GROUPS", "declare", "run"]

ABOUT = "labkit's figures on this machine"
GROUPS = ("engine", "architectures", "kvm", "looking", "encryption", "widgets")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "groups",
        nargs="*",
        choices=[*GROUPS, []],
        default=[],
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)}",
    )
    parser.add_argument(
        "--scale", action="store_true", help="how time grows with size, and nothing else"
    )


def run(args: argparse.Namespace) -> int:
    """Measure; status 0 when every promise is kept. What cannot be measured here breaks none."""
    kept = True
    for group in ["scale"] if args.scale else args.groups or GROUPS:
        try:
            for result in told(_results(group), f"bench {group}"):
                kept = kept and result.ok
                _show(result, args.json)
        except NotAvailable as err:
            _show_missing(group, str(err), args.json)
    return 0 if kept else 1


def _results(group: str) -> Iterator[Result]:
    """The figures of one group, each when it is measured."""
    results: Iterator[Result] = import_module(f"labkit.bench.{group}").results()
    return results


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(result), "ok": result.ok})
    else:
        print(result, flush=True)


def _show_missing(group: str, why: str, as_json: bool) -> None:
    if as_json:
        print_json({"group": group, "not_available": why})
    else:
        print(f"--  {group}: {why}", flush=True)
