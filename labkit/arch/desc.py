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


NONE, HUGE, LAST = Leaf.NONE, Leaf.HUGE, Leaf.LAST


@dataclass(frozen=True)
class Field:
    """A number inside an entry: the bits of mask, shifted right (left when shift is negative, as in a RISC-V PPN)."""

    mask: int
    shift: int = 0

    def get(self, entry: int) -> int:
        """The number that entry holds in this field."""
        value = entry & self.mask
        return value >> self.shift if self.shift >= 0 else value << -self.shift

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


NEVER = Match(
    1, 0
)  # of a present entry whose bit 0 says so; formats whose presence is another bit give their own


@dataclass(frozen=True)
class Level:
    """One level of a walk; str() is its name in the manual. What is None is as the mode says."""

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
    table: Match = Match(
        0
    )  # a present entry above the last level points to a table (else: it is a leaf)
    huge: int = 0  # bits to set in a huge leaf
    made: int = 0  # bits to set in every leaf that labkit makes
    pat_huge: int = 0  # frame bits that mean something else in a huge leaf
    inverted: int = 0  # flag bits that say yes when they are clear
    all_of: tuple[str, ...] = ()  # flags that every level must grant
    any_of: tuple[str, ...] = ()  # flags that one level suffices to set
    denies: Mapping[str, int] | None = field(
        default=None, hash=False
    )  # flag -> bit by which a table takes it away; None: as a leaf
    absent: tuple[str, ...] = ()  # flags that other formats have and that make no difference here
    reserved: int = 0  # bits that must be clear in every present entry
    table_reserved: int = 0  # and those in entries that point to tables
    bad: Match | None = None  # what no present entry may look like
    selector: int = 0  # bits of the root register that choose this format
    signed: bool = True  # canonical gvas are sign extended (else: zero extended)
    byteorder: Literal["little", "big"] = "little"
    entry_size: int = 8
    c_bit: int | None = None

    def with_c_bit(self, n: int, inverted: bool = False) -> PagingMode:
        """The same format with the encryption bit n: a flag "c" that belongs to no frame number (CPUID 0x8000001f EBX[5:0]).

        Inverted, the bit says shared: as TDX's bit and AMD's vTOM, it is clear where a page is encrypted.
        """
        if self.c_bit is not None or not bit(n) & (self.pa.mask | self.reserved):
            raise InvalidState(
                f"{self.name}: bit {n} cannot be the C-bit (frame bits {self.pa.mask:#x})", c_bit=n
            )
        name = f"{self.name} with {'shared bit' if inverted else 'C-bit'} {n}"
        return replace(
            self,
            name=name,
            pa=Field(self.pa.mask & ~bit(n), self.pa.shift),
            flags={**self.flags, "c": bit(n)},
            reserved=self.reserved & ~bit(n),
            inverted=self.inverted | bit(n) * inverted,
            c_bit=n,
        )

    @property
    def c_name(self) -> str:
        """What the manuals call the bit behind flag "c": C (set is encrypted), or S when set is shared."""
        return "S" if self.flags.get("c", 0) & self.inverted else "C"

    def c_word(self, encrypted: bool) -> str:
        """How a leaf says that its page is encrypted or shared: "C=1", with an inverted bit "S=0"."""
        return f"{self.c_name}={int(encrypted ^ (self.c_name == 'S'))}"

    def with_maxphyaddr(self, n: int) -> PagingMode:
        """The same format on a CPU with n physical address bits: frame bits from n up become reserved (SDM vol. 3A 4.1.4)."""
        above = self.pa.mask & ~self.pa.put(self.pa.get(self.pa.mask) & genmask(n - 1, 0))
        return replace(
            self, pa=Field(self.pa.mask & ~above, self.pa.shift), reserved=self.reserved | above
        )

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
        return f"{'<' if self.byteorder == 'little' else '>'}u{self.entry_size}"

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
        return sum({self.flags[name] for name in names})

    def extend(self, gva: int) -> int:
        """The canonical 64-bit address with the translated bits of gva."""
        low = gva & genmask(self.va_bits - 1, 0)
        high = genmask(63, self.va_bits) if self.va_bits < 64 else 0
        return low | high if self.signed and low >> (self.va_bits - 1) else low

    def canonical(self, gva: int) -> bool:
        """Whether a CPU would try to translate gva at all."""
        return self.extend(gva) == gva

    def present_at(self, level: Level) -> Match:
        """The test for entries of this level that mean something."""
        return level.present or self.present

    def table_at(self, level: Level) -> Match:
        """The test for present entries of this level that point to a table; at the last level: that are no leaves."""
        return level.table or (NEVER if level.leaf is LAST else self.table)

    def next_table(self, level: Level) -> Field:
        """Where an entry of this level says where the next table is."""
        return level.pa or self.pa

    def new_table(self, level: Level, gpa: int) -> int:
        """A permissive entry of this level that points to the table at gpa."""
        rights = tuple(name for name in self.all_of if self.denies is None)
        bits = (
            self.present_at(level).value
            | self.table_at(level).value
            | level.must.value
            | self.encode(dict.fromkeys(rights, True))[0]
        )
        return self.next_table(level).put(gpa) | bits

    def new_leaf(self, level: Level, flags: Mapping[str, bool]) -> int:
        """A leaf of this level with these flags, but for its frame."""
        bits = self.present_at(level).value | level.must.value | self.made | self.encode(flags)[0]
        return bits | (0 if level.leaf is LAST else self.huge)

    def grants(self, entry: int, is_table: bool) -> int:
        """What an entry leaves of inherited rights, one bit a flag, to be ANDed over all levels."""
        if self.denies is None or not is_table:
            return entry ^ self.flip
        return ~sum(self.flags[name] for name, mask in self.denies.items() if entry & mask)

    def root(self, register: int) -> int:
        """The gpa of the root table in a register such as CR3, without the bits (PCID, C-bit) that are no part of it."""
        return register & self.pa.get(self.pa.mask)

    def frame(self, level: Level, entry: int) -> int:
        """The gpa of the page that a leaf of this level maps."""
        return self.pa.get(entry) & -level.size

    def leaf_reserved(self, level: Level) -> int:
        """The bits that must be clear in a leaf of this level: those below a huge frame included."""
        low = self.pa.get(self.pa.mask) & (level.size - 1) & ~self.pat_huge
        return self.reserved | self.pa.put(low)

    def rights(self, entry: int, is_table: bool = False) -> dict[str, bool]:
        """The flags of one entry by name, whatever the other levels say; of a table that only takes away, what it takes away."""
        if is_table and self.denies is not None:
            return {f"no {name}": True for name, mask in self.denies.items() if entry & mask}
        entry ^= self.inverted
        return {name: bool(entry & mask) for name, mask in self.flags.items()}

    def encode(self, flags: Mapping[str, bool]) -> tuple[int, int]:
        """The entry bits (to set, to clear) that give these flags; raises InvalidState for a name the mode lacks."""
        flags = {name: on for name, on in flags.items() if name not in self.absent}
        for name in flags:
            if name not in self.flags:
                raise InvalidState(
                    f"{self.name} has no flag {name!r}, only {' '.join(self.flags)}", flag=name
                )
        yes = self._mask(tuple(name for name, on in flags.items() if on))
        mask = self._mask(tuple(flags))
        bits = yes ^ (self.inverted & mask)
        return bits, mask & ~bits

    def letters(self, entry: int, is_table: bool = False) -> str:
        """The flags of one entry as "W U A D NX C" (S for a shared bit that is set); P, which every present entry has, is left out."""
        shown = self.rights(entry, is_table)
        if self.c_name == "S":
            shown = {"s" if name == "c" else name: on ^ (name == "c") for name, on in shown.items()}
        return " ".join(short(name) for name, on in shown.items() if on)


def short(flag: str) -> str:
    """A flag as a label of one or two letters."""
    no, _, name = flag.rpartition(" ")
    return no + (name if len(name) <= 3 else name[0]).upper()
