"""The command line: `labkit doctor | lab | ...`.

With `--json` a command prints one JSON object per line and nothing else on stdout.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Protocol, cast

from labkit.cli.output import print_json, say
from labkit.errors import LabError

__all__ = ["COMMANDS", "Command", "main", "parser"]

# a module each, which is a Command
COMMANDS = ("doctor", "lab", "run", "selftest", "freeze", "bench")

COMPLETING = "_ARGCOMPLETE"  # of the environment, set by a shell that asks for completions
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell gives for SIGINT and SIGPIPE: 128 + the signal


class Command(Protocol):
    """What a command's module has; what it needs beyond argparse it imports when it runs."""

    ABOUT: str  # one line in the list of commands; the help of the command is its docstring

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit status; raises LabError with what is said on stderr."""


def parser() -> argparse.ArgumentParser:
    """The parser with every command.

    Each sets `run`, a function from the arguments to the exit status.
    """
    top = argparse.ArgumentParser(
        prog="labkit", description="The guest framework of the Linux KVM selftests as a lab."
    )
    top.add_argument("--version", action="version", version=f"labkit {version('labkit')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"labkit.cli.{name}")
        command = cast(Command, module)
        own = commands.add_parser(name, help=command.ABOUT, description=module.__doc__)
        command.declare(own)
        own.add_argument(
            "--json", action="store_true", help="one JSON object per line, nothing else on stdout"
        )
        own.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    A LabError is one line on stderr, with --json one object on stdout, and status 1.
    """
    commands = parser()
    if COMPLETING in os.environ:
        _complete(commands)
    args = commands.parse_args(argv)
    _print_every_letter()
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except LabError as err:
        if args.json:
            print_json({"error": type(err).__name__, "message": str(err)})
        else:
            say(f"labkit {args.command}: {err}", is_error=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `labkit doctor | head` is no error; another stdout, or the exit would raise once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _complete(commands: argparse.ArgumentParser) -> None:
    """The shell asks what could come next: say it, and end."""
    from argcomplete import autocomplete

    autocomplete(commands)


def _print_every_letter() -> None:
    """A guest may print what the terminal's encoding lacks: that comes out as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
