"""What a hostile or careless host can do to an encrypted guest, one function each.

What comes of it depends on the protection. Under SEV and SEV-ES memory has no integrity: ciphertext
can be moved, replayed and remapped, and the guest finds out by what it reads. SNP's RMP refuses the
host's writes, and the guest's use of a remapped page (Morbitzer et al., "SEVered", 2018; Wilke et
al., "SEVurity", 2020).
"""

from __future__ import annotations

from dataclasses import replace

from labkit.arch.desc import Field
from labkit.checked import checked
from labkit.errors import InvalidState
from labkit.machine.memory import PAGE
from labkit.paging.walk import Walk, walk
from labkit.session.vm import Vm
from labkit.sev.guest import ProtectedGuest

__all__ = [
    "flip_c_bit",
    "flip_ciphertext_bit",
    "move_ciphertext",
    "pool_in_private_memory",
    "remap",
    "replay",
    "walk_through_dram",
    "walk_without_mask",
]


@checked
def move_ciphertext(vm: Vm, source: int, target: int, size: int = PAGE) -> None:
    """Copy DRAM from one gpa to another; size in bytes.

    The address is part of the tweak, so the guest reads garbage there. Raises InvalidState where
    SNP's RMP refuses the write.
    """
    vm.memory.write(target, vm.memory.read(source, size))
    vm.changed()


@checked
def replay(vm: Vm, gpa: int, old: bytes) -> None:
    """Put ciphertext back that was read at the same gpa before.

    The guest reads its old plaintext, and cannot tell. Raises InvalidState where SNP's RMP refuses
    the write.
    """
    vm.memory.write(gpa, old)
    vm.changed()


@checked
def flip_ciphertext_bit(vm: Vm, gpa: int, bit: int = 0) -> None:
    """Change one bit (0 to 7) of a byte of DRAM.

    Exactly the 16-byte block around it becomes garbage to the guest. Raises InvalidState for no
    bit of a byte, and where SNP's RMP refuses the write.
    """
    if not 0 <= bit < 8:
        raise InvalidState(f"gpa {gpa:#x}: a byte has the bits 0 to 7, not {bit}", bit=bit)
    byte = vm.memory.read(gpa, 1)[0]
    flipped = byte ^ 1 << bit
    vm.memory.write(gpa, bytes([flipped]))
    vm.changed()


@checked
def remap(vm: Vm, gpa: int, other: int) -> None:
    """Exchange two pages in the nested page table.

    The tweak goes with the DRAM page, so each decrypts well at the wrong place. SNP's RMP knows
    which gpa each page belongs to: the guest's next access to either exits to the host (#NPF,
    MemoryFaultExit). Raises InvalidState without protection.
    """
    guest = _need_guest(vm)
    vm.machine.swap_pages(gpa, other)
    guest.remap(gpa, other)
    vm.changed()


@checked
def pool_in_private_memory(vm: Vm) -> None:
    """Have the launch encrypt the ucall pool, as a host that gets its list wrong does.

    The guest's leaves still say that it is shared. Guest and host then agree on what they see,
    ciphertext of what was there before: a slot's address is none any longer, and under SNP the
    guest's first write exits to the host (#NPF). Raises InvalidState after the launch, and without
    protection or pool.
    """
    _need_guest(vm)
    pool = vm.pool
    vm.mem_set_private(pool.gpa, pool.nr_pages * PAGE)


@checked
def flip_c_bit(vm: Vm, gva: str | int) -> None:
    """Turn the encryption bit of a leaf around and encrypt nothing.

    That is what a guest with a bug does to its own page tables. What was private is then read as
    the ciphertext it is; what was shared is decrypted without ever having been encrypted. Raises
    InvalidState for a gva that is not mapped, and without protection.
    """
    _need_guest(vm)
    space = vm.machine.space
    gva = vm.gva_of(gva)
    steps = space.walk(gva).steps
    last = steps[-1] if steps else None
    if last is None or last.kind != "leaf":
        raise InvalidState(f"gva {gva:#x} is not mapped: there is no leaf to change", gva=gva)

    entry = last.entry ^ space.mode.flags["c"]
    vm.machine.poke(last.entry_gpa, entry.to_bytes(space.mode.entry_size, space.mode.byteorder))
    vm.changed()


@checked
def walk_without_mask(vm: Vm, gva: str | int) -> Walk:
    """Walk as a tool that takes the C-bit for part of the frame number ("the one-bit bug").

    It ends far outside of memory.
    """
    space = vm.machine.space
    plain = vm.arch.mode
    every_high_bit = Field((1 << 52) - PAGE, plain.pa.shift)
    naive = replace(plain, pa=every_high_bit, reserved=0)
    return walk(space.eye, naive, space.root_gpa, vm.gva_of(gva))


@checked
def walk_through_dram(vm: Vm, gva: str | int) -> Walk:
    """Walk as a host that does not know better: through DRAM as it is.

    There the tables of an encrypted guest are ciphertext.
    """
    return vm.machine.space.host_walk(vm.gva_of(gva))


def _need_guest(vm: Vm) -> ProtectedGuest:
    if vm.guest is None:
        raise InvalidState(f"{vm.name} is not protected: there is nothing to break")
    return vm.guest
