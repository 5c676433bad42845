"""Registers of a vCPU as attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from labkit.arch.model import Arch
from labkit.checked import whole
from labkit.engines.base import EngineVcpu
from labkit.errors import InvalidState, KvmError
from labkit.machine.turns import Turns

__all__ = ["Registers", "flags_text"]

MASK64 = (1 << 64) - 1
COLUMNS = 3  # of the registers as text


def flags_text(arch: Arch, value: int) -> str:
    """The names of the set flags, most significant first."""
    names = sorted(arch.flag_names, key=lambda name: arch.flag_names[name], reverse=True)
    return " ".join(name for name in names if value >> arch.flag_names[name] & 1)


class Registers:
    """`regs.rip` reads a register, `regs.rip = 0x1000` writes it; `regs["xmm0"]` works too.

    `ready` is called after every write. `check` is called before every access and raises KvmError
    when the registers are none of the host's business. A name or a value that does not fit is
    InvalidState; for an attribute's name, AttributeError.
    """

    _arch: Arch
    _cpu: EngineVcpu
    _ready: Callable[[], None]
    _check: Callable[[], None]
    _turn: Turns

    def __init__(
        self,
        arch: Arch,
        cpu: EngineVcpu,
        ready: Callable[[], None],
        check: Callable[[], None],
        turn: Turns,
    ) -> None:
        # Plain assignments would be writes of registers.
        object.__setattr__(self, "_arch", arch)
        object.__setattr__(self, "_cpu", cpu)
        object.__setattr__(self, "_ready", ready)
        object.__setattr__(self, "_check", check)
        object.__setattr__(self, "_turn", turn)

    def __getitem__(self, name: str) -> int:
        if not isinstance(name, str):
            raise InvalidState(f"a register has a name, not {name!r}")
        with self._turn.looking:
            self._check()
            return self._cpu.read_reg(name)

    def __setitem__(self, name: str, value: int) -> None:
        if not isinstance(name, str):
            raise InvalidState(f"a register has a name, not {name!r}")
        if type(value) is not int:
            value = whole(value, name)
        if -(1 << 63) <= value < 0:
            value &= MASK64
        with self._turn.act(f"a write of {name}"):
            self._check()
            self._cpu.set_regs({name: value})
            self._ready()

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except InvalidState as error:
            if "name" not in error.facts:
                raise
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: int) -> None:
        self[name] = value

    def __dir__(self) -> list[str]:
        return list(self._cpu.get_regs())

    def all(self) -> Mapping[str, int]:
        """Every register by name."""
        with self._turn.looking:
            self._check()
            return self._cpu.get_regs()

    def __repr__(self) -> str:
        try:
            self._check()
        except KvmError as error:
            return f"<registers that the host cannot see: {error}>"
        shown = [f"{name:>8} {self[name]:016x}" for name in self._arch.shown]
        lines = ["  ".join(shown[at : at + COLUMNS]) for at in range(0, len(shown), COLUMNS)]
        flags = flags_text(self._arch, self[self._arch.flags])
        return "\n".join([*lines, f"   flags {flags or 'none'}"])
