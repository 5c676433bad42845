"""A secure processor over a little memory, and guests in any state, for the SEV tests."""

from __future__ import annotations

from typing import Any

from labkit.errors import PspError
from labkit.machine.memory import Memory
from labkit.session.arrivals import arrived
from labkit.sev import transport
from labkit.sev.commands import GuestState
from labkit.sev.ghcb import GHCB
from labkit.sev.policy import Policy
from labkit.sev.psp import Psp

PLAIN = bytes(range(256)) * 16
SPA = 0x4000


def make_psp(seed: int = 0, size: int = 1 << 18, **options: Any) -> Psp:
    """A platform after INIT; every page of its memory holds PLAIN."""
    memory = Memory()
    memory.add(0, size)
    memory.write(0, PLAIN * (size // 4096))
    psp = Psp(memory, seed, **options)
    psp.command("INIT")
    return psp


def start(psp: Psp, policy: int = Policy.ES, asid: int = 0) -> int:
    """An active guest after LAUNCH_START."""
    handle = psp.command("LAUNCH_START", policy=policy)
    psp.command("ACTIVATE", handle=handle, asid=asid or psp.asids(bool(policy & Policy.ES))[0])
    return int(handle)


def receiving(psp: Psp, policy: int = Policy.ES, asid: int = 0) -> int:
    """An active guest after RECEIVE_START, from another platform."""
    source = make_psp(77)
    sent = in_state(source, GuestState.RUNNING, policy)
    session = source.command("SEND_START", handle=sent, pdh=psp.pdh)
    handle = psp.command("RECEIVE_START", policy=policy, pdh=source.pdh, session=session)
    psp.command("ACTIVATE", handle=handle, asid=asid or psp.asids(bool(policy & Policy.ES))[0])
    return int(handle)


def in_state(psp: Psp, state: GuestState, policy: int = Policy.ES, asid: int = 0) -> int:
    """The handle of an active guest that was brought to this state.

    For UNINIT it is one that does not exist.
    """
    if state is GuestState.UNINIT:
        return 99
    if state is GuestState.RECEIVE_UPDATE:
        return receiving(psp, policy, asid)
    handle = start(psp, policy, asid)
    steps = {
        "LAUNCH_UPDATE_DATA": {"spa": SPA, "size": 4096},
        "LAUNCH_MEASURE": {"size": 48},
        "LAUNCH_FINISH": {},
        "SEND_START": {"pdh": psp.pdh},
        "SEND_FINISH": {},
    }
    for name, fields in steps.items():
        if psp.guests[handle].state is state and name != "LAUNCH_UPDATE_DATA":
            break
        psp.command(name, handle=handle, **fields)
    assert psp.guests[handle].state is state
    return handle


def good_fields(psp: Psp, name: str, handle: int) -> dict[str, Any]:
    """Fields with which a command succeeds when state and policy let it."""
    guest = psp.guests.get(handle)
    kind = {"LAUNCH_SECRET": 1, "RECEIVE_UPDATE_DATA": 2, "RECEIVE_UPDATE_VMSA": 3}.get(name)
    if kind:
        keys = guest.keys if guest else transport.TransportKeys(bytes(16), bytes(16))
        measure = guest.measure if guest and kind == 1 else b""
        header, data = transport.wrap(keys, kind, PLAIN[:64], bytes(16), measure)
        return {"handle": handle, "spa": SPA, "header": header, "data": data}
    own: dict[str, dict[str, Any]] = {
        "LAUNCH_MEASURE": {"size": 48},
        "SEND_START": {"pdh": psp.pdh},
        "ACTIVATE": {"asid": 2},
        "DBG_ENCRYPT": {"spa": SPA, "data": PLAIN[:32]},
        "DBG_DECRYPT": {"spa": SPA, "size": 4096},
    }
    if "UPDATE" in name:
        return {"handle": handle, "spa": SPA, "size": 4096}
    return {"handle": handle} | own.get(name, {})


def status_of(psp: Psp, name: str, **fields: Any) -> int:
    """The status a command ends with: 0 or that of the error."""
    try:
        psp.command(name, **fields)
    except PspError as err:
        assert err.command == name
        return int(err.status)  # type: ignore[call-overload, no-any-return]
    return 0


def ghcb_page(code: int, info_1: int = 0, info_2: int = 0, **regs: int) -> bytes:
    """A GHCB page with one request, every field of it marked valid."""
    page = bytearray(4096)
    fields = {"sw_exit_code": code, "sw_exit_info_1": info_1, "sw_exit_info_2": info_2, **regs}
    for name, value in fields.items():
        GHCB.put(page, name, value)
    GHCB.put(page, "valid_bitmap", sum(1 << GHCB.fields[name][0] // 8 for name in fields))
    return bytes(page)


def once(vcpu: Any, max_insns: int) -> Any:
    """One exit: behind a VMGEXIT that the host has answered, `vcpu.run` itself goes on."""
    return arrived(vcpu.vm, vcpu, vcpu.cpu.run(max_insns))
