"""How debug information numbers the registers of each architecture.

Sources: System V ABI for AMD64 figure 3.36; DWARF for the Arm 64-bit Architecture (AADWARF64) 4.1;
RISC-V ABIs Specification, DWARF register numbers; ELF ABI s390x supplement 1.6, table 1.8.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CFA_ABOVE_SP", "DWARF_REGISTERS", "RESTORED_BY", "RETURNS_IN"]

_X86_64 = ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp")

DWARF_REGISTERS: Mapping[str, Mapping[int, str]] = {
    "x86_64": {
        **dict(enumerate(_X86_64)),
        **{number: f"r{number}" for number in range(8, 16)},
        16: "rip",
    },
    "arm64": {**{number: f"x{number}" for number in range(31)}, 31: "sp"},
    "riscv64": dict(
        enumerate(
            (
                *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"),
                *(f"a{number}" for number in range(8)),
                *(f"s{number}" for number in range(2, 12)),
                *(f"t{number}" for number in range(3, 7)),
            )
        )
    ),
    "s390x": {number: f"r{number}" for number in range(16)},
}
"""By architecture: number -> labkit's name of the register. AMD64's 16 is the return address."""

CFA_ABOVE_SP: Mapping[str, int] = {"s390x": 160}
"""Bytes from a caller's stack pointer up to the CFA of what it calls, where they are not the same.

On s390x the caller keeps a save area of 160 bytes for what it calls (ELF ABI s390x 1.2.2).
"""

RESTORED_BY: Mapping[str, str] = {"s390x": r"lmg %r\d+, %r15"}
"""The instruction (a regular expression) behind which all registers are the caller's again.

Only for compilers that leave the end of a function out of the call frame information.
"""

RETURNS_IN: Mapping[str, str] = {"arm64": "x30", "riscv64": "ra", "s390x": "r14"}
"""The register that a call leaves its return address in; AMD64's leaves it on the stack."""
