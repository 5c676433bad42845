"""The vocabulary in which an architecture describes its page tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Literal

from labkit.bits import bit, genmask
from labkit.errors import InvalidState

__all__ = [
    "HUGE",
    "LAST",
    "NEVER",
    "NONE",
    "Field",
    "Leaf",
    "Level",
    "Match",
    "PagingMode",
    "short",
]


class Leaf(Enum):
    """Whether the entries of a level can, must or must not be leaves."""

    NONE = "none"
    HUGE = "huge"
    LAST = "last"


NONE = Leaf.NONE
HUGE = Leaf.HUGE
LAST = Leaf.LAST


@dataclass(frozen=True)
class Field:
    """A number inside an entry: the bits of mask, shifted right.

    Left when shift is negative, as in a RISC-V PPN.
    """

    mask: int
    shift: int = 0

    def get(self, entry: int) -> int:
        """The number that entry holds in this field."""
        value = entry & self.mask
        if self.shift >= 0:
            return value >> self.shift
        return value << -self.shift

    def put(self, value: int) -> int:
        """The entry bits that hold value; raises InvalidState when it does not fit."""
        bits = value << self.shift if self.shift >= 0 else value >> -self.shift
        if bits & ~self.mask or self.get(bits) != value:
            raise InvalidState(
                f"{value:#x} does not fit the entry bits {self.mask:#x}",
                value=value,
                mask=self.mask,
            )
        return bits


@dataclass(frozen=True)
class Match:
    """A test of an entry: the bits under mask equal value (default: all of them set)."""

    mask: int
    value: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", self.value & self.mask)

    def __call__(self, entry: int) -> bool:
        return entry & self.mask == self.value


# Of a present entry whose bit 0 says so. Formats whose presence is another bit give their own.
NEVER = Match(1, 0)


@dataclass(frozen=True)
class Level:
    """One level of a walk; str() is its name in the manual.

    What is None here is as the mode says.
    """

    name: str
    shift: int
    bits: int
    leaf: Leaf = NONE
    present: Match | None = None
    table: Match | None = None  # at the last level: entries that should be leaves and are none
    pa: Field | None = None  # the next table
    must: Match = Match(0)  # a present entry that does not look so is reserved
    empty: int = 0  # an entry that maps nothing

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Bytes of address space that one entry covers."""
        return 1 << self.shift

    @property
    def nr_entries(self) -> int:
        """Entries in one table of this level."""
        return 1 << self.bits

    @property
    def table_size(self) -> int:
        """Bytes of one table of this level (8-byte entries)."""
        return 8 << self.bits

    def index(self, gva: int) -> int:
        """The entry of this level's table that translates gva."""
        return (gva >> self.shift) & (self.nr_entries - 1)


@dataclass(frozen=True)
class PagingMode:
    """A page-table format as a table of facts; one walker, one scanner and one builder read it."""

    name: str
    levels: tuple[Level, ...]  # from the root down
    present: Match
    pa: Field  # the frame, as a gpa
    flags: Mapping[str, int] = field(hash=False)  # name -> bit

    # A present entry above the last level that looks so points to a table; else it is a leaf.
    table: Match = Match(0)

    # Bits to set: in a huge leaf, and in every leaf that labkit makes.
    huge: int = 0
    made: int = 0

    pat_huge: int = 0  # frame bits that mean something else in a huge leaf
    inverted: int = 0  # flag bits that say yes when they are clear

    # How levels combine: flags that every level must grant, and those that one suffices to set.
    all_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()

    # Flag -> bit by which a table takes it away; None: a table's flags are those of a leaf.
    denies: Mapping[str, int] | None = field(default=None, hash=False)

    absent: tuple[str, ...] = ()  # flags that other formats have and that make no difference here

    # Bits that must be clear: in every present entry, and in those that point to tables too.
    reserved: int = 0
    table_reserved: int = 0

    bad: Match | None = None  # what no present entry may look like
    selector: int = 0  # bits of the root register that choose this format
    signed: bool = True  # canonical gvas are sign extended (else: zero extended)
    byteorder: Literal["little", "big"] = "little"
    entry_size: int = 8  # bytes
    c_bit: int | None = None  # the number of the encryption bit

    def with_c_bit(self, n: int, inverted: bool = False) -> PagingMode:
        """The same format with the encryption bit n (CPUID 0x8000001f EBX[5:0]).

        It is a flag "c" that belongs to no frame number. Inverted, the bit says shared: as TDX's
        bit and AMD's vTOM, it is clear where a page is encrypted. Raises InvalidState for a bit
        that is no frame bit, and for a second one.
        """
        if self.c_bit is not None or not bit(n) & (self.pa.mask | self.reserved):
            raise InvalidState(
                f"{self.name}: bit {n} cannot be the C-bit (frame bits {self.pa.mask:#x})", c_bit=n
            )
        kind = "shared bit" if inverted else "C-bit"
        return replace(
            self,
            name=f"{self.name} with {kind} {n}",
            pa=Field(self.pa.mask & ~bit(n), self.pa.shift),
            flags={**self.flags, "c": bit(n)},
            reserved=self.reserved & ~bit(n),
            inverted=self.inverted | bit(n) if inverted else self.inverted,
            c_bit=n,
        )

    @property
    def c_name(self) -> str:
        """What the manuals call the bit behind flag "c": C, or S when set is shared."""
        return "S" if self.flags.get("c", 0) & self.inverted else "C"

    def c_word(self, encrypted: bool) -> str:
        """How a leaf says that its page is encrypted or shared: "C=1", if inverted "S=0"."""
        is_set = encrypted if self.c_name == "C" else not encrypted
        return f"{self.c_name}={int(is_set)}"

    def with_maxphyaddr(self, n: int) -> PagingMode:
        """The same format on a CPU with n physical address bits (SDM vol. 3A 4.1.4).

        Frame bits from n up become reserved.
        """
        below = self.pa.put(self.pa.get(self.pa.mask) & genmask(n - 1, 0))
        above = self.pa.mask & ~below
        return replace(self, pa=Field(below, self.pa.shift), reserved=self.reserved | above)

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Bytes that a leaf can map, smallest first."""
        return tuple(level.size for level in reversed(self.levels) if level.leaf is not NONE)

    @property
    def va_bits(self) -> int:
        """Bits of a gva that the tables translate."""
        return self.levels[0].shift + self.levels[0].bits

    @property
    def dtype(self) -> str:
        """An entry as numpy spells it."""
        order = "<" if self.byteorder == "little" else ">"
        return f"{order}u{self.entry_size}"

    @cached_property
    def flag_mask(self) -> int:
        """All flag bits of an entry."""
        return self._mask(tuple(self.flags))

    @cached_property
    def inherit(self) -> int:
        """The flag bits that depend on every level of the walk."""
        return self._mask(self.all_of + self.any_of)

    @cached_property
    def flip(self) -> int:
        """Entry bits to flip so that a plain AND over all levels gives the inherited rights."""
        return self.inverted ^ self._mask(self.any_of)

    def _mask(self, names: tuple[str, ...]) -> int:
        mask = 0
        for name in names:
            mask |= self.flags[name]
        return mask

    def extend(self, gva: int) -> int:
        """The canonical 64-bit address with the translated bits of gva."""
        low = gva & genmask(self.va_bits - 1, 0)
        if self.signed and self.va_bits < 64 and low >> (self.va_bits - 1):
            return low | genmask(63, self.va_bits)
        return low

    def canonical(self, gva: int) -> bool:
        """Whether a CPU would try to translate gva at all."""
        return self.extend(gva) == gva

    def present_at(self, level: Level) -> Match:
        """The test for entries of this level that mean something."""
        return level.present or self.present

    def table_at(self, level: Level) -> Match:
        """The test for present entries of this level that point to a table.

        At the last level, where there is none below: for those that are no leaves.
        """
        if level.table is not None:
            return level.table
        return NEVER if level.leaf is LAST else self.table

    def next_table(self, level: Level) -> Field:
        """Where an entry of this level says where the next table is."""
        return level.pa or self.pa

    def new_table(self, level: Level, gpa: int) -> int:
        """A permissive entry of this level that points to the table at gpa."""
        bits = self.present_at(level).value | self.table_at(level).value | level.must.value
        if self.denies is None:
            rights, _ = self.encode(dict.fromkeys(self.all_of, True))
            bits |= rights
        return self.next_table(level).put(gpa) | bits

    def new_leaf(self, level: Level, flags: Mapping[str, bool]) -> int:
        """A leaf of this level with these flags, but for its frame.

        Raises InvalidState for a flag that the format lacks.
        """
        rights, _ = self.encode(flags)
        bits = self.present_at(level).value | level.must.value | self.made | rights
        if level.leaf is not LAST:
            bits |= self.huge
        return bits

    def grants(self, entry: int, is_table: bool) -> int:
        """What an entry leaves of inherited rights, one bit a flag, to be ANDed over all levels."""
        if self.denies is None or not is_table:
            return entry ^ self.flip
        return ~sum(self.flags[name] for name, mask in self.denies.items() if entry & mask)

    def root(self, register: int) -> int:
        """The gpa of the root table in a register such as CR3.

        Without the bits (PCID, C-bit) that are no part of it.
        """
        return register & self.pa.get(self.pa.mask)

    def frame(self, level: Level, entry: int) -> int:
        """The gpa of the page that a leaf of this level maps."""
        return self.pa.get(entry) & -level.size

    def leaf_reserved(self, level: Level) -> int:
        """The bits that must be clear in a leaf of this level, also those below a huge frame."""
        low = self.pa.get(self.pa.mask) & (level.size - 1) & ~self.pat_huge
        return self.reserved | self.pa.put(low)

    def rights(self, entry: int, is_table: bool = False) -> dict[str, bool]:
        """The flags of one entry by name, whatever the other levels say.

        Of a table in a format whose tables only take away, what it takes away.
        """
        if is_table and self.denies is not None:
            return {f"no {name}": True for name, mask in self.denies.items() if entry & mask}
        entry ^= self.inverted
        return {name: bool(entry & mask) for name, mask in self.flags.items()}

    def encode(self, flags: Mapping[str, bool]) -> tuple[int, int]:
        """The entry bits (to set, to clear) that give these flags.

        Raises InvalidState for a name that the format lacks, unless it makes no difference here.
        """
        yes = 0
        mask = 0
        for name, on in flags.items():
            if name in self.absent:
                continue
            if name not in self.flags:
                raise InvalidState(
                    f"{self.name} has no flag {name!r}, only {' '.join(self.flags)}", flag=name
                )
            mask |= self.flags[name]
            if on:
                yes |= self.flags[name]
        bits = yes ^ (self.inverted & mask)
        return bits, mask & ~bits

    def letters(self, entry: int, is_table: bool = False) -> str:
        """The flags of one entry as "W U A D NX C" (S for a shared bit that is set).

        P, which every present entry has, is left out.
        """
        letters = []
        for name, on in self.rights(entry, is_table).items():
            if name == "c" and self.c_name == "S":
                name = "s"
                on = not on
            if on:
                letters.append(short(name))
        return " ".join(letters)


def short(flag: str) -> str:
    """A flag as a label of a few letters: "W" of writable, "NX" of nx, "noW" of "no writable"."""
    no, _, name = flag.rpartition(" ")
    if len(name) > 3:
        name = name[0]
    return no + name.upper()
