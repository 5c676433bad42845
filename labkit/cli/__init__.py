"""The command line: `labkit doctor | lab | ...`; with `--json` one JSON object per line and nothing else on stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from labkit.errors import LabError

__all__ = ["COMMANDS", "main", "parser"]

# a module each, with add(subparsers); what it needs is imported when it runs
COMMANDS = ("doctor", "lab", "run", "selftest", "freeze", "bench")


def parser() -> argparse.ArgumentParser:
    """The parser with every command; each sets `run`, a function from the arguments to the exit status."""
    top = argparse.ArgumentParser(
        prog="labkit", description="The guest framework of the Linux KVM selftests as a lab."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"labkit.cli.{name}").add(commands)
        command.add_argument(
            "--json", action="store_true", help="one JSON object per line, nothing else on stdout"
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a LabError is one line on stderr (with --json one object), status 1."""
    args = parser().parse_args(argv)
    getattr(sys.stdout, "reconfigure", dict)(
        errors="backslashreplace"
    )  # a guest may print what the terminal's encoding lacks
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except LabError as err:
        if args.json:
            print(json.dumps({"error": type(err).__name__, "message": str(err)}), flush=True)
        else:
            print(f"labkit {args.command}: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `labkit doctor | head`: not an error; stdout is replaced so that the exit does not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
