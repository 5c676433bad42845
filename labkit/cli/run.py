"""`labkit run`: one guest, from C or from an ELF file, with every ucall it makes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.cli.said import print_came, print_end
from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.guest.program import Program
    from labkit.session.running import Came

__all__ = ["ABOUT", "create_options", "declare", "load", "number", "place", "run"]

ABOUT = "run a guest and print its ucalls"
ELF_MAGIC = b"\x7fELF"
C_SUFFIXES = (".c", ".h", ".S", ".cc")  # what is given to the compiler


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    _declare_guest(parser)
    _declare_protection(parser)
    _declare_running(parser)


def _declare_guest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a C file or an ELF file linked at fixed addresses")
    parser.add_argument(
        "--entry",
        default="guest_code",
        type=place,
        help="function or address to begin at (default: guest_code)",
    )
    parser.add_argument("--arch", help="of a C file (default: x86_64); an ELF file says it itself")
    parser.add_argument(
        "-D",
        dest="defines",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a macro for a C file; may be given again",
    )
    parser.add_argument(
        "--backend",
        default="unicorn",
        help="engine: unicorn or kvm (default: unicorn); unicorn,kvm compares them",
    )
    parser.add_argument(
        "--vcpus", type=int, default=1, metavar="N", help="how many vCPUs (default: 1)"
    )


def _declare_protection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protect", choices=("sev", "sev-es", "snp", "tdx"), help="memory encryption"
    )
    parser.add_argument("--policy", type=number, metavar="N", help="of an encrypted guest's launch")
    parser.add_argument(
        "--c-bit",
        type=number,
        metavar="N",
        help="where an encrypted guest's page tables have the C-bit",
    )


def _declare_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedule", help="round_robin:QUANTUM, random:SEED:QUANTUM, sequential or parallel"
    )
    parser.add_argument(
        "--memory",
        type=number,
        metavar="BYTES",
        help="size of the memslot at gpa 0 (default: what program and vCPUs need)",
    )
    parser.add_argument(
        "--privilege",
        choices=("kernel", "user"),
        help="ring of the guests (default: the engine's, see labkit doctor)",
    )
    parser.add_argument(
        "--max-insns", type=int, metavar="N", help="stop after N instructions of all vCPUs together"
    )


def number(text: str) -> int:
    """A number in any base that C writes.

    Raises ValueError; argparse says this function's name to somebody whose text is none.
    """
    return int(text, 0)


def place(text: str) -> str | int:
    """A symbol, or an address."""
    return number(text) if text[:1].isdigit() else text


def load(path: Path, arch: str | None, defines: Sequence[str] = ()) -> Program:
    """A program from C, with macros as "NAME" or "NAME=VALUE", or from ELF.

    Raises NotAvailable for a file that cannot be read, InvalidState for an ELF file of another
    architecture than `arch` or with macros, and the errors of the guest room.
    """
    from labkit.guest.program import Program

    try:
        if path.exists() and not path.is_file():
            raise NotAvailable(f"{path}: not a regular file", path=path)
        with path.open("rb") as file:
            magic = file.read(len(ELF_MAGIC))
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    if magic != ELF_MAGIC and path.suffix in C_SUFFIXES:
        return Program.compile(path, arch=arch or "x86_64", defines=tuple(defines))
    if defines:
        raise InvalidState(f"{path} is no C file: -D {defines[0]} has nothing to define it for")
    program = Program.load(path)
    if arch not in (None, program.arch):
        raise InvalidState(f"{path} is for {program.arch}, not for {arch}", path=path)
    return program


def run(args: argparse.Namespace) -> int:
    """Run the guest to its end; status 0 when every vCPU reached DONE, and all engines agree."""
    if args.max_insns is not None and args.max_insns < 0:
        raise InvalidState(f"--max-insns {args.max_insns}: a budget is not negative")
    program = load(args.file, args.arch, args.defines)
    if "," in args.backend:
        from labkit.cli.run_compared import run_compared

        return run_compared(args, program)
    return _run_on_one(args, program)


def create_options(args: argparse.Namespace) -> dict[str, Any]:
    """What Vm.create takes beyond program, entry, vCPUs and engine."""
    return {
        "protect": args.protect,
        "schedule": args.schedule,
        "privilege": args.privilege,
        "policy": args.policy,
        "c_bit": args.c_bit,
        "memory": args.memory,
    }


def _run_on_one(args: argparse.Namespace, program: Program) -> int:
    from labkit.lab import Vm
    from labkit.session.explain import ending

    options = create_options(args)
    with Vm.create(program, args.entry, args.vcpus, args.backend, **options) as vm:
        last: Came | None = None
        try:
            for last in vm.stream(args.max_insns):
                print_came(last, args.json)
        except KeyboardInterrupt:
            return print_end(vm, "interrupted", "Ctrl-C", args.json)
        end, why = ending(vm, last)
        return print_end(vm, end, why, args.json)
