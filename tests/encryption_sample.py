"""Encrypted guests to draw: page tables against memory, a page with its ciphertext, launches."""

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
from labkit.sev.psp import Psp
from labkit.sev.rmp import Rmp, RmpEntry
from labkit.sev.snp import PageType, SnpGuest

MEMORY_SIZE = 1 << 21
PLAN = ((0x10000, 8), (0x18000, 6), (0x20000, 20), (0xD0000, 48), (0x180000, 8))
ASID, OTHER_ASID = 5, 7
PAGE_GPA = 0xD0000  # of the page that eyes() looks at


def private() -> NDArray[np.bool_]:
    """The pages that page tables and host agree to encrypt, of 512."""
    out = np.zeros(512, bool)
    for part in sample.memory(True).ranges:
        first = part.gpa // 4096
        out[first : first + part.nr_pages] = part.protected
    return out


def encryption(c_bit: int = 51, inverted: bool = False) -> EncryptionMap:
    """SEV-ES with two pages that are not what the page tables say.

    One of test_mem holds plaintext, one of the mailbox ciphertext.
    """
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
    """SNP with pages that are not as they should be.

    Some nobody validated, some were never launched, and one belongs to another guest.
    """
    truth, valid = private(), np.ones(512, bool)
    meant = truth.copy()
    truth[0xE0:0xE4] = False
    valid[0xD8:0xDC] = False
    owner = np.where(truth, ASID, 0)
    owner[0x28] = OTHER_ASID
    return encryption_map(
        sample.page_table(51),
        [PageStates.of(0, truth, meant, owner, valid, ASID)],
        sample.memory(True),
        protection="snp",
    )


def eyes(
    at: tuple[int, ...] = (0x238, 0x278), secret: bool = True, what: str = "test_mem"
) -> PageEyes:
    """A page before and after the guest wrote a byte at each of these offsets."""
    old = bytearray(4096)
    old[0x279:0x27F] = b"he hos"
    old[0x800:0xA60] = bytes(i * 37 + 11 & 255 for i in range(0x260))
    new = bytearray(old)
    for offset in at:
        new[offset] ^= 0x74

    cipher = MemoryCipher(bytes(range(16)))

    def in_dram(data: bytearray) -> bytes:
        return cipher.encrypt(PAGE_GPA, data) if secret else bytes(data)

    return PageEyes(
        gpa=PAGE_GPA,
        host=in_dram(new),
        guest=bytes(new),
        previous_host=in_dram(old),
        previous_guest=bytes(old),
        private=secret,
        word="C=1" if secret else "C=0",
        what=what,
        gva=0x90406A0000,
        step=sample.STEP,
        since_step=sample.EARLIER,
    )


def vm_facts() -> dict[str, object]:
    """What the sample VM has beside when it is protected."""
    return {"c_bit": 51, "encryption": encryption(), "eyes": eyes(), "launch": launch()}


def launch(finished: bool = True) -> LaunchProgress:
    """A SEV-ES launch with a LAUNCH_FINISH that comes too early."""
    psp = make_psp(size=MEMORY_SIZE)
    handle = start(psp, Policy.ES | Policy.NODBG)
    commands: list[tuple[str, dict[str, int]]] = [
        ("LAUNCH_UPDATE_DATA", {"spa": gpa, "size": nr_pages * 4096}) for gpa, nr_pages in PLAN
    ]
    commands.insert(3, ("LAUNCH_FINISH", {}))
    commands += [("LAUNCH_MEASURE", {"size": 48}), ("LAUNCH_FINISH", {})]
    if not finished:
        commands = commands[:4]

    steps, measurement = _run(psp, handle, commands)
    guest = psp.guests[handle]
    return LaunchProgress(
        protection="SEV-ES",
        state=guest.state,
        steps=steps,
        slots=((0, MEMORY_SIZE),),
        planned=PLAN,
        policy=guest.policy,
        measurement=measurement,
        expected=guest.digest if finished else b"",
    )


def _run(
    psp: Psp, handle: int, commands: list[tuple[str, dict[str, int]]]
) -> tuple[tuple[LaunchStep, ...], bytes]:
    """What came of the commands, one after the other, and what LAUNCH_MEASURE gave."""
    steps = [LaunchStep("LAUNCH_START")]
    measurement = b""
    for name, fields in commands:
        try:
            out = psp.command(name, handle=handle, **fields)
        except PspError as err:
            steps.append(LaunchStep(name, refused=err.status, found=str(err.found)))  # type: ignore[arg-type]
            continue
        measurement = out or measurement
        if "UPDATE" in name:
            steps += launch_steps(psp.guests[handle].measured[-1:])
        else:
            steps.append(LaunchStep(name))
    return tuple(steps), measurement


def snp_launch(nr_pages: int = 70) -> LaunchProgress:
    """An SNP launch in progress, page by page."""
    psp, rmp = make_psp(size=MEMORY_SIZE), Rmp()
    guest = SnpGuest(psp, rmp, 0xB0000, 3)
    for i in range(nr_pages):
        gpa = 0x40000 + 4096 * i
        rmp.update(gpa, RmpEntry(True, 3, gpa, immutable=True))
        kind = PageType.NORMAL
        if i == 66:
            kind = PageType.SECRETS
        elif i > 60:
            kind = PageType.ZERO
        guest.update(gpa, kind)
    return LaunchProgress(
        protection="SNP",
        state=guest.state,
        steps=launch_steps(guest.measured),
        slots=((0, MEMORY_SIZE),),
        planned=((0x40000, 90),),
        policy=guest.policy,
        expected=bytes(48),
    )
