"""A bare `unicorn.Uc` in the state of a labkit vCPU.

It is what labkit's engine is measured against, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import unicorn
from unicorn import x86_const as x86

from labkit.engines.unicorn.native.lib import STOP, Handle

if TYPE_CHECKING:
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["open_twin", "open_uc", "pc", "stop_at_in"]


def open_uc(hva: int, size: int, regs: Mapping[str, int]) -> Any:
    """A Uc over host memory, in long mode with these registers."""
    uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)  # type: ignore[attr-defined, no-untyped-call]
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    uc.mem_map_ptr(0, size, unicorn.UC_PROT_ALL, hva)
    for table in ("gdt", "idt"):
        uc.reg_write(
            getattr(x86, f"UC_X86_REG_{table.upper()}R"),
            (0, regs[f"{table}_base"], regs[f"{table}_limit"], 0),
        )
    uc.msr_write(0xC0000080, regs["efer"])
    for name in (
        "cr4",
        "cr3",
        "cr0",
        "cs",
        "ss",
        "ds",
        "es",
        "fs",
        "gs",
        "rsp",
        "rdi",
        "rsi",
        "rdx",
        "rflags",
        "rip",
    ):
        uc.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), regs[name])
    return uc


def open_twin(vcpu: UnicornVcpu, hva: int, size: int, end: int) -> Handle:
    """An engine over host memory in the state of a labkit vCPU of any architecture, with one hook.

    It ends a run at gva `end`.
    """
    quirks = vcpu.vm.quirks
    handle = Handle(quirks.uc_arch, quirks.uc_mode, quirks.settings)
    handle.map(0, hva, size, unicorn.UC_PROT_ALL)
    handle.set_context(vcpu.handle.context())
    handle.hook(unicorn.UC_HOOK_CODE, STOP, end, end)
    return handle


def pc(uc: Any) -> int:
    """RIP."""
    return int(uc.reg_read(x86.UC_X86_REG_RIP))


def stop_at_in(uc: Any, seen: Callable[[int, int], int]) -> None:
    """End the run at every IN, whose value is what `seen(port, size)` returns."""

    def hook(uc: Any, port: int, size: int, _data: object) -> int:
        uc.emu_stop()
        return seen(port, size)

    uc.hook_add(unicorn.UC_HOOK_INSN, hook, None, 1, 0, x86.UC_X86_INS_IN)
