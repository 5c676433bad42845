"""Every form of an instruction against the processor: stepped, and run in one go.

`make semantics` takes all states; `make test` takes one of them.
"""

from __future__ import annotations

import os
import random
import struct

import pytest
from guests import CODE, DATA, HANDLERS, STACK_TOP, asm_all, bare, start
from native import GPRS, SIZE, Native
from semantics import TOLERATED, forms, tolerated

import labkit as lk
from labkit.engines.disasm import disassemble
from labkit.engines.exits import BudgetExit

FLAGS = 0x8D5  # the arithmetic ones
NR_STATES = int(os.environ.get("LABKIT_SEMANTICS", "1"))
EDGES = (0, 1, (1 << 64) - 1, 1 << 63, 0x7FFF_FFFF, 0x8000_0000, 0x80, 0xFF00, 1 << 31 << 32)
DOUBLES = (0.0, -0.0, 1.0, -1.5, 3.75, 1e300, 5e-324, float("inf"), float("nan"), 1e-310, 2.0**63)


@pytest.fixture(scope="module")
def vm():
    with bare("nop", user=True, backend="unicorn") as vm:
        yield vm


@pytest.fixture(scope="module")
def assembled() -> list[tuple[str, bytes]]:
    names, texts = zip(*forms(), strict=True)
    return list(zip(names, asm_all(*texts), strict=True))


def state(seed: int) -> tuple[dict[str, int], bytes]:
    """Registers and data of one state."""
    chance = random.Random(seed)

    def word() -> int:
        return chance.choice([chance.choice(EDGES), chance.getrandbits(64), chance.getrandbits(9)])

    floats = struct.pack("<4d", *(chance.choice(DOUBLES) for _ in range(4)))
    data = floats if seed % 2 else chance.randbytes(32)
    data += struct.pack("<4d", *(chance.choice(DOUBLES) for _ in range(4))) + chance.randbytes(64)
    regs = {
        "rip": CODE,
        "rsp": STACK_TOP - 256,
        "rsi": DATA,
        "rdi": DATA + 0x200,
        "rbx": DATA + SIZE,
        "rflags": 0x202 | chance.getrandbits(12) & FLAGS,
        **{name: word() for name in ("rax", "rcx", "rdx", "rbp", "r8", "r9")},
    }
    return regs, data


def on_native(
    native: Native, code: bytes, regs: dict[str, int], data: bytes
) -> tuple[dict[str, int], bytes] | None:
    """What the processor leaves; None when it faults."""
    native.begin({CODE: code, DATA: data}, regs)
    while CODE <= native.regs()["rip"] < CODE + len(code):
        if native.step():
            return None
    return native.regs(), native.read(DATA, SIZE)


def on_unicorn(
    vm: lk.Vm, code: bytes, regs: dict[str, int], data: bytes, stepped: bool
) -> tuple[dict[str, int], bytes] | None:
    """The same of labkit."""
    vcpu = vm.vcpus[0]
    vm.write(CODE, code.ljust(256, b"\xf4"))
    vm.write(DATA, data.ljust(SIZE, b"\0"))
    start(vcpu, user=True)
    vcpu.cpu.set_regs(dict.fromkeys(set(GPRS) - {"rip", "rflags"}, 0) | regs)
    vcpu.cpu.set_regs({"mxcsr": 0x1F80, "cr4": vcpu.regs.cr4 | 0x600})
    insns = len(list(disassemble("x86_64", code, CODE)))
    if stepped:
        for _ in range(insns):
            came = vcpu.step()
            assert came is None, came
    else:
        came = vcpu.run(insns)
        assert isinstance(came, BudgetExit), came
    if HANDLERS <= vcpu.pc < HANDLERS + 0x1000:
        return None
    return {name: vcpu.regs[name] for name in GPRS}, vcpu.read(DATA, SIZE)


def difference(name: str, ours, theirs) -> str:
    """How two outcomes differ beyond what is tolerated, "" when they do not."""
    if ours is None or theirs is None:
        return (
            "" if ours is theirs else f"labkit {ours and 'runs'}, the processor {theirs and 'runs'}"
        )
    mask = FLAGS & ~tolerated(name)
    for register in GPRS:
        a, b = ours[0][register], theirs[0][register]
        if register == "rflags":
            a, b = a & mask, b & mask
        if a != b:
            return f"{register} {a:#x}, the processor {b:#x}"
    if ours[1] != theirs[1]:
        at = next(i for i in range(SIZE) if ours[1][i] != theirs[1][i])
        return f"[DATA+{at:#x}] {ours[1][at : at + 16].hex()}, not {theirs[1][at : at + 16].hex()}"
    return ""


@pytest.mark.parametrize("seed", range(NR_STATES))
def test_that_every_form_does_what_the_processor_does(native, vm, assembled, seed):
    wrong = []
    regs, data = state(seed)
    for name, code in assembled:
        theirs = on_native(native, code, regs, data)
        for stepped in (True, False):
            found = difference(name, on_unicorn(vm, code, regs, data, stepped), theirs)
            if found:
                wrong.append(f"{name}{' stepped' if stepped else ''}: {found}")
    assert not wrong, f"{len(wrong)} of {len(assembled)} forms:\n" + "\n".join(wrong[:60])


def test_that_there_are_enough_forms_and_every_tolerance_has_a_cause():
    assert len(forms()) >= 580
    assert all(cause for _, _, cause in TOLERATED)
