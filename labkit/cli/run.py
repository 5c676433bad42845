"""`labkit run`: one guest, from C or from an ELF file, with every ucall it makes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.engines.exits import Exit
    from labkit.guest.program import Program
    from labkit.lab import Vm
    from labkit.ucall.pool import Ucall

__all__ = ["add", "load", "number", "place"]

COMMANDS = ("SYNC", "PRINTF", "ABORT", "DONE", "NONE", "UNHANDLED")


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "run a guest and print its ucalls"
    parser: argparse.ArgumentParser = commands.add_parser("run", help=about, description=__doc__)
    parser.add_argument("file", type=Path, help="a C file or an ELF file linked at fixed addresses")
    parser.add_argument(
        "--entry",
        default="guest_code",
        type=place,
        help="function or address to begin at (default: guest_code)",
    )
    parser.add_argument("--arch", help="of a C file (default: x86_64); an ELF file says it itself")
    parser.add_argument(
        "--backend",
        default="unicorn",
        help="engine: unicorn or kvm (default: unicorn); unicorn,kvm compares them",
    )
    parser.add_argument(
        "--vcpus", type=int, default=1, metavar="N", help="how many vCPUs (default: 1)"
    )
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
    parser.add_argument(
        "--schedule", help="round_robin:QUANTUM, random:SEED:QUANTUM, sequential or parallel"
    )
    parser.add_argument(
        "--privilege",
        choices=("kernel", "user"),
        help="ring of the guests (default: the engine's, see labkit doctor)",
    )
    parser.add_argument(
        "--max-insns", type=int, metavar="N", help="stop after N instructions of all vCPUs together"
    )
    parser.set_defaults(run=_run)
    return parser


def number(text: str) -> int:
    """What argparse names to somebody whose text is none."""
    return int(text, 0)


def place(text: str) -> str | int:
    """A symbol, or an address."""
    return number(text) if text[:1].isdigit() else text


def load(path: Path, arch: str | None) -> Program:
    """A program from C or ELF; raises NotAvailable for a file that cannot be read, and the errors of the guest room."""
    from labkit.guest.program import Program

    try:
        image = path.read_bytes()
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    if image[:4] != b"\x7fELF" and path.suffix in (".c", ".h", ".S", ".cc"):
        return Program.compile(path, arch=arch or "x86_64")
    program = Program.load(path)
    if arch not in (None, program.arch):
        raise InvalidState(f"{path} is for {program.arch}, not for {arch}", path=path)
    return program


def _run(args: argparse.Namespace) -> int:
    from labkit.lab import Vm
    from labkit.session.explain import ending

    if args.max_insns is not None and args.max_insns < 0:
        raise InvalidState(f"--max-insns {args.max_insns}: a budget is not negative")
    program = load(args.file, args.arch)
    if "," in args.backend:
        return _compare(args, program)
    with Vm.create(
        program,
        args.entry,
        args.vcpus,
        args.backend,
        args.protect,
        schedule=args.schedule,
        privilege=args.privilege,
        policy=args.policy,
        c_bit=args.c_bit,
    ) as vm:
        last: Ucall | Exit | None = None
        try:
            for last in vm.stream(args.max_insns):
                _show(last, args.json)
        except KeyboardInterrupt:
            return _end(vm, "interrupted", "Ctrl-C", args.json)
        return _end(vm, *ending(vm, last), args.json)


def _compare(args: argparse.Namespace, program: Program) -> int:
    """Several engines: with --json what each said, one after the other; then whether they agree."""
    import labkit
    from labkit.session.explain import ending
    from labkit.session.running import drive

    backends = args.backend.split(",")
    left = len(backends) if args.json else 0  # a run after those only asks what the clock does

    def host(vm: Vm) -> Ucall | Exit | None:
        nonlocal left
        left, loud = left - 1, left > 0
        last = drive(
            vm, args.max_insns, partial(_show, as_json=True, backend=vm.backend) if loud else None
        )
        end, why = ending(vm, last)
        if loud:
            print(
                json.dumps({"backend": vm.backend, "end": end, "why": why, "insns": vm.step}),
                flush=True,
            )
        return last

    found = labkit.compare(
        program,
        backends,
        args.entry,
        args.vcpus,
        host=host,
        protect=args.protect,
        schedule=args.schedule,
        privilege=args.privilege or "kernel",
        policy=args.policy,
        c_bit=args.c_bit,
    )
    if args.json:
        print(
            json.dumps(
                {
                    "end": "equal" if found.equal else "different",
                    "ends": dict(zip(found.backends, found.ends, strict=True)),
                    "differences": [asdict(difference) for difference in found.differences],
                    "tolerated": found.causes,
                }
            ),
            flush=True,
        )
    else:
        print(found.text)
    return 0 if found.equal and set(found.ends) == {"done"} else 1


def _show(came: Ucall | Exit, as_json: bool, **more: str) -> None:
    from labkit.ucall.pool import BadUcallExit, Ucall

    if isinstance(came, Ucall):
        print(json.dumps(more | _as_json(came)) if as_json else _as_text(came), flush=True)
    elif isinstance(came, BadUcallExit):
        if as_json:
            print(
                json.dumps(
                    more
                    | {
                        "vcpu": came.vcpu,
                        "cmd": "NONE",
                        "args": [0] * 7,
                        "text": None,
                        "why": came.why,
                    }
                ),
                flush=True,
            )
        else:
            print(str(came), file=sys.stderr, flush=True)


def _as_json(ucall: Ucall) -> dict[str, Any]:
    known = ucall.cmd in COMMANDS
    line: dict[str, Any] = {
        "vcpu": ucall.vcpu,
        "cmd": ucall.cmd if known else "NONE",
        "args": list(ucall.args),
        "text": ucall.text,
    }
    if not known:
        line["number"] = int(ucall.cmd.rstrip("?"), 16)
    if ucall.cmd == "ABORT":
        line |= {"file": ucall.file, "line": ucall.line, "expr": ucall.expr}
    return line


def _as_text(ucall: Ucall) -> str:
    if ucall.cmd == "PRINTF":
        return f"vCPU {ucall.vcpu}: {(ucall.text or '').rstrip(chr(10))}"
    return repr(ucall)[7:-1]


def _end(vm: Vm, end: str, why: str, as_json: bool) -> int:
    vcpus = [
        {"vcpu": v.index, "state": v.state, "at": v.where(), "insns": v.step_count}
        for v in vm.vcpus
    ]
    if as_json:
        print(
            json.dumps(
                {
                    "end": end,
                    "why": why,
                    "insns": vm.step,
                    "exact": all(v.exact for v in vm.vcpus),
                    "vcpus": vcpus,
                }
            ),
            flush=True,
        )
    else:
        least = "" if all(v.exact for v in vm.vcpus) else "at least "
        print(
            f"{end}{': ' + why if why else ''} ({least}{vm.step} instructions)",
            file=sys.stdout if end == "done" else sys.stderr,
        )
        for v in vcpus if end != "done" else ():
            print(f"  vCPU {v['vcpu']} {v['state']} at {v['at']}", file=sys.stderr)
    return 0 if end == "done" else 130 if end == "interrupted" else 1
