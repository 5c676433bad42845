"""How `labkit run` prints what a guest said and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.cli.output import print_json, say

if TYPE_CHECKING:
    from labkit.lab import Vm
    from labkit.session.running import Came
    from labkit.ucall.calls import BadUcallExit, Ucall

__all__ = ["print_came", "print_end"]

COMMANDS = ("SYNC", "PRINTF", "ABORT", "DONE", "NONE", "UNHANDLED")
STATUS = {"done": 0, "interrupted": 130}  # of how a run ended; 1 for every other end


def print_came(came: Came, as_json: bool, **more: str) -> None:
    """Print a ucall on stdout, a bad one on stderr; of other exits the end says enough.

    With JSON both are objects on stdout, which begin with `more`.
    """
    from labkit.ucall.calls import BadUcallExit, Ucall

    if isinstance(came, Ucall):
        if as_json:
            print_json(more | _as_json(came))
        else:
            say(_as_text(came))
    elif isinstance(came, BadUcallExit):
        if as_json:
            print_json(more | _bad_as_json(came))
        else:
            say(str(came), is_error=True)


def _as_json(ucall: Ucall) -> dict[str, Any]:
    """A number that is no command is a NONE with its `number`; an ABORT says where it stands."""
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


def _bad_as_json(bad: BadUcallExit) -> dict[str, Any]:
    return {"vcpu": bad.vcpu, "cmd": "NONE", "args": [0] * 7, "text": None, "why": bad.why}


def _as_text(ucall: Ucall) -> str:
    if ucall.cmd == "PRINTF":
        text = ucall.text or ""
        return f"vCPU {ucall.vcpu}: {text.rstrip(chr(10))}"
    return repr(ucall).removeprefix("<Ucall ").removesuffix(">")


def print_end(vm: Vm, end: str, why: str, as_json: bool) -> int:
    """Print how a run ended, with every vCPU's place, and return the exit status.

    As text a good end is a line on stdout, another one stands on stderr with the vCPUs.
    """
    exact = all(vcpu.exact for vcpu in vm.vcpus)
    vcpus = [
        {
            "vcpu": vcpu.index,
            "state": vcpu.state,
            "at": vcpu.where(),
            "insns": vcpu.step_count,
        }
        for vcpu in vm.vcpus
    ]
    if as_json:
        print_json({"end": end, "why": why, "insns": vm.step, "exact": exact, "vcpus": vcpus})
    else:
        because = f": {why}" if why else ""
        least = "" if exact else "at least "
        line = f"{end}{because} ({least}{vm.step} instructions)"
        say(line, is_error=end != "done")
        if end != "done":
            for facts in vcpus:
                where = f"{facts['state']} at {facts['at']}"
                say(f"  vCPU {facts['vcpu']} {where}", is_error=True)
    return STATUS.get(end, 1)
