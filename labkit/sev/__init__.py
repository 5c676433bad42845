"""AMD SEV as a model: it needs no engine and draws no view.

Its parts are the memory cipher, the secure processor, KVM's rules, SNP's page table, VMSA and GHCB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.arch.x86_cpu import CpuModel
    from labkit.machine.memory import Memory
    from labkit.sev.guest import ProtectedGuest

    MakeGuest = Callable[[Memory, CpuModel], ProtectedGuest]

__all__ = ["PROTECTIONS", "SIMPLIFIED", "protection"]

# What `protect=` takes, and what the host loses by it
PROTECTIONS = (
    (
        "sev",
        "memory: the host reads ciphertext of every private page, "
        "and its page tables are such pages",
    ),
    (
        "sev-es",
        "memory and registers: exits become #VC in the guest, "
        "which tells its host what it wants through VMGEXIT",
    ),
    (
        "snp",
        "memory, registers and ownership: the RMP refuses the host's writes, "
        "the guest validates its pages",
    ),
    ("tdx", "memory, with a shared bit in place of the C-bit"),
)

# What the model leaves out, and why; each file's docstring says the same about its own part
SIMPLIFIED = (
    (
        "tweak constants",
        "real ones differ per part and are secret; these are labkit's own, "
        "the algebra is the published one",
    ),
    (
        "certificates",
        "nobody signs for a Diffie-Hellman key, so a DOMAIN policy cannot be proven "
        "and forbids SEND",
    ),
    (
        "attestation reports and ID blocks",
        "they need AMD's signing keys; the launch digest and the measurement are real",
    ),
    (
        "WBINVD",
        "the model has no caches: one DF_FLUSH stands for what hardware needs "
        "WBINVD on every core for",
    ),
    (
        "VMPLs and huge RMP pages",
        "labkit's guests run at VMPL0 on 4 KiB pages, so there is no RMPADJUST and no PSMASH",
    ),
    (
        "VMSAs that the host wrote into",
        "a vCPU that loads garbage is no lesson; the write is refused, "
        "SNP's hardware refuses it too",
    ),
    (
        "starting APs, guest requests",
        "labkit's vCPUs begin at their entry and nobody signs reports, "
        "so those GHCB events are refused",
    ),
    (
        "TDX's module",
        "its pages are encrypted and measured by the secure processor's launch; "
        "registers stay open, there is no #VE",
    ),
    ("the CPUID page", "SNP's firmware compares it with the CPU; the model checks its count only"),
)


def protection(
    kind: str | None, policy: int | None = None, c_bit: int | None = None, launch: bool = True
) -> MakeGuest | None:
    """What makes a VM's encryption; None for a plain VM (kind None).

    Raises InvalidState for a plain VM with settings that only an encrypted one has; launch=False is
    such a setting. The kind itself is checked when the guest is made.
    """
    from labkit.sev.guest import ProtectedGuest

    if kind is not None:
        return partial(ProtectedGuest, kind, policy=policy, c_bit=c_bit)

    given = []
    if policy is not None:
        given.append(f"policy={policy}")
    if c_bit is not None:
        given.append(f"c_bit={c_bit}")
    if not launch:
        given.append(f"launch={launch}")
    if given:
        kinds = ", ".join(repr(name) for name, _ in PROTECTIONS)
        raise InvalidState(
            f"{' and '.join(given)}: only an encrypted guest has that, with protect={kinds}"
        )
    return None
