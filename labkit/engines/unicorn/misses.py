"""Pages that are not there: what a fetch that found none means, and what labkit's own walker had to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.disasm import disassemble
from labkit.engines.exits import Exit, InternalErrorExit
from labkit.engines.unicorn.mmu import FETCH, NEED, NONCANONICAL, NOT_YOURS

if TYPE_CHECKING:
    from labkit.engines.unicorn.mmu import Mmu
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["fetch_fault", "mmu_miss"]


def _whole(vcpu: UnicornVcpu, code: bytes) -> bool:
    """Whether the first instruction in code is all there, so that it is a later one that cannot be fetched."""
    return (
        len(code) == vcpu.quirks.longest
        or next(disassemble(vcpu.vm.arch, code, 0), None) is not None
    )


def fetch_fault(vcpu: UnicornVcpu, pc: int, spent: bool) -> Exit | None:
    """Code ends here, or further on: Unicorn fetches a whole block before it runs the first instruction."""
    code = vcpu.guards.read(pc, vcpu.quirks.longest)
    if _whole(vcpu, code):
        if vcpu.shortened == (pc, vcpu.insns):
            return vcpu.refuse("Unicorn cannot fetch this instruction and does not say why")
        vcpu.shortened = (pc, vcpu.insns)
        vcpu.quirks.shorten_block()
    elif not spent:
        if vcpu.exception is not None:
            return vcpu.quirks.exception(vcpu.exception)
        gpa = vcpu.translate(pc + len(code), uc.UC_PROT_EXEC)
        return InternalErrorExit(
            f"instruction fetch from gpa {gpa or 0:#x}, where no memslot is", pc
        )
    vcpu.quirks.forget_exception()
    return None


def mmu_miss(vcpu: UnicornVcpu, mmu: Mmu, pc: int, limit: int) -> Exit | None:
    """The walker found no page, or one whose view must be made anew first."""
    facts = mmu.facts
    why, gva, code, fetch = facts.why, facts.gva, facts.code, facts.type == FETCH
    ran = vcpu.count() if fetch else vcpu.before(pc)  # what cannot be fetched was never begun
    vcpu.insns += ran - vcpu.guards.extra()
    if why == NEED:
        vcpu.vm.forget_translations(code=mmu.settle(facts.gpa))
        vcpu.sync()
        return None
    if fetch and _whole(vcpu, vcpu.guards.read(pc, vcpu.quirks.longest)):
        vcpu.quirks.shorten_block()
        return None
    if fetch and limit and ran >= limit:
        return None
    if why == NOT_YOURS:
        return _not_yours(vcpu, mmu, pc)
    return vcpu.quirks.miss(
        None if why == NONCANONICAL else code,
        max(pc, gva) if fetch else mmu.where(vcpu.handle, pc, gva),
    )


def _not_yours(vcpu: UnicornVcpu, mmu: Mmu, pc: int) -> Exit | None:
    """A page that this guest may not use so."""
    facts = mmu.facts
    gva, gpa, private, fetch = facts.gva, facts.gpa, facts.code != 0, facts.type == FETCH
    fault = mmu.not_yours()
    exit: Exit | None = vcpu.quirks.not_yours(
        fault, max(pc, gva) if fetch else mmu.where(vcpu.handle, pc, gva), gpa, private
    )
    return exit
