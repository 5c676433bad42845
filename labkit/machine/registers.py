"""Registers of a vCPU as attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from labkit.arch.model import Arch
from labkit.engines.base import EngineVcpu
from labkit.errors import InvalidState, KvmError

__all__ = ["Registers", "flags_text"]

MASK64 = (1 << 64) - 1


def flags_text(arch: Arch, value: int) -> str:
    """The names of the set flags, most significant first."""
    names = sorted(arch.flag_names, key=lambda name: -arch.flag_names[name])
    return " ".join(name for name in names if value >> arch.flag_names[name] & 1)


class Registers:
    """`regs.rip` reads a register, `regs.rip = 0x1000` writes it; `regs["xmm0"]` works too."""

    _arch: Arch
    _cpu: EngineVcpu
    _ready: Callable[[], None]
    _check: Callable[[], None]

    def __init__(
        self, arch: Arch, cpu: EngineVcpu, ready: Callable[[], None], check: Callable[[], None]
    ) -> None:
        object.__setattr__(self, "_arch", arch)
        object.__setattr__(self, "_cpu", cpu)
        object.__setattr__(self, "_ready", ready)
        object.__setattr__(
            self, "_check", check
        )  # raises when they are none of the host's business

    def __getitem__(self, name: str) -> int:
        self._check()
        return self._cpu.read_reg(name)

    def __setitem__(self, name: str, value: int) -> None:
        if not isinstance(value, int):
            raise InvalidState(f"{name} takes a number, not {value!r}", name=name)
        self._check()
        self._cpu.set_regs({name: value & MASK64 if -(1 << 63) <= value < 0 else value})
        self._ready()

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except InvalidState as err:
            if "name" not in err.facts:
                raise
            raise AttributeError(str(err)) from None

    def __setattr__(self, name: str, value: int) -> None:
        self[name] = value

    def __dir__(self) -> list[str]:
        return list(self._cpu.get_regs())

    def all(self) -> Mapping[str, int]:
        """Every register by name."""
        self._check()
        return self._cpu.get_regs()

    def __repr__(self) -> str:
        try:
            self._check()
        except KvmError as err:
            return f"<registers that the host cannot see: {err}>"
        rows = [f"{name:>8} {self[name]:016x}" for name in self._arch.shown]
        flags = flags_text(self._arch, self[self._arch.flags])
        return (
            "\n".join("  ".join(rows[i : i + 3]) for i in range(0, len(rows), 3))
            + f"\n   flags {flags or 'none'}"
        )
