"""Encrypted guests to draw: page tables with a C-bit or a shared bit, what memory really is, a page with its ciphertext, launches."""

from __future__ import annotations

import numpy as np
import views_sample as sample
from numpy.typing import NDArray
from sev_sample import make_psp, start

from labkit.errors import PspError
from labkit.look.encryption import EncryptionMap, PageStates
from labkit.look.encryption_map import encryption_map
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress, LaunchStep, launch_steps
from labkit.sev.cipher import MemoryCipher
from labkit.sev.policy import Policy
from labkit.sev.rmp import Rmp, RmpEntry
from labkit.sev.snp import PageType, SnpGuest

PLAN = ((0x10000, 8), (0x18000, 6), (0x20000, 20), (0xD0000, 48), (0x180000, 8))


def private() -> NDArray[np.bool_]:
    """The pages that page tables and host agree to encrypt, of 512."""
    out = np.zeros(512, bool)
    for part in sample.memory(True).ranges:
        out[part.gpa // 4096 : part.gpa // 4096 + part.nr_pages] = part.protected
    return out


def encryption(c_bit: int = 51, inverted: bool = False) -> EncryptionMap:
    """SEV-ES with one page of test_mem that holds plaintext and one of the mailbox that holds ciphertext."""
    truth = private()
    meant = truth.copy()
    truth[0xD4], truth[0x102] = False, True
    meant[0xD4] = False
    return encryption_map(
        sample.page_table(c_bit, inverted=inverted),
        [PageStates.of(0, truth, meant)],
        sample.memory(True),
        protection="tdx" if inverted else "sev-es",
        facts=("policy 0x5",),
    )


def snp() -> EncryptionMap:
    """SNP with pages that nobody validated, that were never launched, and one that belongs to another guest."""
    truth, valid = private(), np.ones(512, bool)
    meant = truth.copy()
    truth[0xE0:0xE4], valid[0xD8:0xDC] = False, False
    owner = np.where(truth, 5, 0)
    owner[0x28] = 7
    return encryption_map(
        sample.page_table(51),
        [PageStates.of(0, truth, meant, owner, valid, 5)],
        sample.memory(True),
        protection="snp",
    )


def eyes(
    at: tuple[int, ...] = (0x238, 0x278), secret: bool = True, what: str = "test_mem"
) -> PageEyes:
    """A page before and after the guest wrote a byte at each of these offsets."""
    old = bytearray(4096)
    old[0x279:0x27F], old[0x800:0xA60] = b"he hos", bytes(i * 37 + 11 & 255 for i in range(0x260))
    new = bytearray(old)
    for offset in at:
        new[offset] ^= 0x74
    cipher = MemoryCipher(bytes(range(16)))
    host, before = (cipher.encrypt(0xD0000, data) if secret else bytes(data) for data in (new, old))
    return PageEyes(
        0xD0000,
        host,
        bytes(new),
        before,
        bytes(old),
        secret,
        "C=1" if secret else "C=0",
        what,
        0x90406A0000,
        1277,
        1180,
    )


def vm_facts() -> dict[str, object]:
    """What the sample VM has beside when it is protected."""
    return {"c_bit": 51, "encryption": encryption(), "eyes": eyes(), "launch": launch()}


def launch(finished: bool = True) -> LaunchProgress:
    """A SEV-ES launch with a LAUNCH_FINISH that comes too early."""
    psp = make_psp(size=1 << 21)
    handle = start(psp, Policy.ES | Policy.NODBG)
    guest, steps = psp.guests[handle], [LaunchStep("LAUNCH_START")]
    todo = [("LAUNCH_UPDATE_DATA", {"spa": gpa, "size": nr * 4096}) for gpa, nr in PLAN]
    todo.insert(3, ("LAUNCH_FINISH", {}))
    blob = b""
    for name, fields in [*todo, ("LAUNCH_MEASURE", {"size": 48}), ("LAUNCH_FINISH", {})][
        : None if finished else 4
    ]:
        try:
            blob = psp.command(name, handle=handle, **fields) or blob
            steps += launch_steps(guest.measured[-1:]) if "UPDATE" in name else [LaunchStep(name)]
        except PspError as err:
            steps.append(LaunchStep(name, refused=err.status, found=str(err.found)))  # type: ignore[arg-type]
    return LaunchProgress(
        "SEV-ES",
        guest.state,
        tuple(steps),
        ((0, 1 << 21),),
        PLAN,
        guest.policy,
        blob,
        guest.digest if finished else b"",
    )


def snp_launch(nr_pages: int = 70) -> LaunchProgress:
    """An SNP launch in progress, page by page."""
    psp, rmp = make_psp(size=1 << 21), Rmp()
    guest = SnpGuest(psp, rmp, 0xB0000, 3)
    for i in range(nr_pages):
        gpa = 0x40000 + 4096 * i
        rmp.update(gpa, RmpEntry(True, 3, gpa, immutable=True))
        guest.update(
            gpa, PageType.SECRETS if i == 66 else PageType.ZERO if i > 60 else PageType.NORMAL
        )
    return LaunchProgress(
        "SNP",
        guest.state,
        launch_steps(guest.measured),
        ((0, 1 << 21),),
        ((0x40000, 90),),
        guest.policy,
        expected=bytes(48),
    )
