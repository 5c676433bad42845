"""`labkit doctor`: what this machine can do for the lab, and how to get what is missing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import groupby

from labkit.cli.findings import DEFAULT_ENGINE, Finding, examine
from labkit.cli.output import print_json

__all__ = ["ABOUT", "declare", "run"]

ABOUT = "what this machine can do, and why not"


def declare(parser: argparse.ArgumentParser) -> None:
    """It has no arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Print every finding, one kind after the other; status 0 when the default engine is usable."""
    usable = False
    for kind, group in groupby(examine(), key=lambda finding: finding.kind):
        findings = list(group)
        if any(_is_default_engine(finding) and finding.ok for finding in findings):
            usable = True
        if args.json:
            for finding in findings:
                print_json(asdict(finding))
        else:
            print(_table(kind, findings), flush=True)
    if not args.json:
        print(f"\nThe default engine, {DEFAULT_ENGINE}, is {'usable' if usable else 'NOT usable'}.")
    return 0 if usable else 1


def _is_default_engine(finding: Finding) -> bool:
    return finding.kind == "engine" and finding.name == DEFAULT_ENGINE


def _table(kind: str, findings: list[Finding]) -> str:
    """The findings of one kind under each other, in columns."""
    name_width = max(len(finding.name) for finding in findings)
    version_width = max(len(finding.version) for finding in findings)
    lines = [kind]
    for finding in findings:
        columns = (
            "yes" if finding.ok else " no",
            finding.name.ljust(name_width),
            finding.version.ljust(version_width),
            finding.note,
        )
        lines.append(f"  {'  '.join(columns)}".rstrip())
    return "\n".join(lines)
