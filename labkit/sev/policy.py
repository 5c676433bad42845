"""What a guest's owner demands (policies) and what the secure processor answers (status codes).

Sources: SEV API (AMD 55766) chapter 3 (policy) and section 4.4 (status codes); SNP ABI (AMD 56860),
guest policy; numbers as in Linux include/uapi/linux/psp-sev.h.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from labkit.errors import PspError

__all__ = [
    "Policy",
    "SnpPolicy",
    "Status",
    "policy_api",
    "refusal",
    "refuse_first",
    "snp_policy_api",
]


class Policy(IntFlag):
    """Bits of a SEV or SEV-ES policy.

    NODBG: the host may not debug. NOKS: no other guest may share the key. ES: registers are
    encrypted too. NOSEND: the guest never leaves this platform. DOMAIN: it goes only to platforms
    of the same owner, SEV: only to platforms with SEV. Bits 23:16 and 31:24 hold the least API
    version (`policy_api`).
    """

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3
    DOMAIN = 1 << 4
    SEV = 1 << 5


class SnpPolicy(IntFlag):
    """Bits of an SNP policy.

    Bits 15:8 and 7:0 hold the least ABI version (`snp_policy_api`).
    """

    SMT = 1 << 16
    RESERVED_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20


def policy_api(policy: int) -> tuple[int, int]:
    """(major, minor) of the least firmware that a SEV policy accepts."""
    return policy >> 16 & 0xFF, policy >> 24 & 0xFF


def snp_policy_api(policy: int) -> tuple[int, int]:
    """(major, minor) of the least firmware that an SNP policy accepts."""
    return policy >> 8 & 0xFF, policy & 0xFF


class Status(IntEnum):
    """What a command of the secure processor ended with; `sentence` says it in words."""

    sentence: str

    def __new__(cls, code: int, sentence: str) -> Status:
        """A status from its number and its sentence."""
        status = int.__new__(cls, code)
        status._value_ = code
        status.sentence = sentence
        return status

    SUCCESS = 0x00, "done"
    INVALID_PLATFORM_STATE = 0x01, "the platform is not initialised, or is already"
    INVALID_GUEST_STATE = 0x02, "the guest is in a state that does not allow this command"
    INVALID_CONFIG = 0x03, "the platform's configuration does not allow it"
    INVALID_LEN = 0x04, "a length is wrong: zero, no multiple of 16, or too short for the result"
    ALREADY_OWNED = 0x05, "the platform has an owner"
    INVALID_CERTIFICATE = 0x06, "a certificate or Diffie-Hellman key cannot be used"
    POLICY_FAILURE = 0x07, "the guest's policy forbids it"
    INACTIVE = 0x08, "the guest has no ASID: ACTIVATE comes first"
    INVALID_ADDRESS = 0x09, "an address is misaligned or not memory"
    BAD_SIGNATURE = 0x0A, "a signature does not verify"
    BAD_MEASUREMENT = 0x0B, "a MAC does not verify: other key, other data, or other measurement"
    ASID_OWNED = 0x0C, "another guest has this ASID"
    INVALID_ASID = 0x0D, "there is no such ASID, or it is kept for the other kind of guest"
    WBINVD_REQUIRED = 0x0E, "the caches must be flushed (WBINVD) first"
    DFFLUSH_REQUIRED = 0x0F, "this ASID was used before: DF_FLUSH comes first"
    INVALID_GUEST = 0x10, "no guest has this handle"
    INVALID_COMMAND = 0x11, "there is no such command"
    ACTIVE = 0x12, "the guest has an ASID: DEACTIVATE comes first"
    HWERROR_PLATFORM = 0x13, "hardware error, the platform is unharmed"
    HWERROR_UNSAFE = 0x14, "hardware error, the platform must be reset"
    UNSUPPORTED = 0x15, "this platform, or this guest, does not have the feature (SEV-ES)"
    INVALID_PARAM = 0x16, "a parameter has a value that is not allowed"
    RESOURCE_LIMIT = 0x17, "the firmware has no room for one more"
    SECURE_DATA_INVALID = 0x18, "the firmware's own storage is damaged"
    INVALID_PAGE_SIZE = 0x19, "the RMP has another size for this page"
    INVALID_PAGE_STATE = 0x1A, "the RMP has this page in a state that does not allow it"
    INVALID_MDATA_ENTRY = 0x1B, "a metadata entry is wrong"
    INVALID_PAGE_OWNER = 0x1C, "the RMP gives this page to another guest"
    AEAD_OFLOW = 0x1D, "a message counter is at its end"
    EXIT_RING_BUFFER = 0x1F, "the ring buffer was left"
    RMP_INIT_REQUIRED = 0x20, "the RMP is not initialised"
    BAD_SVN = 0x21, "a security version number is too low"
    BAD_VERSION = 0x22, "a version is not supported"
    SHUTDOWN_REQUIRED = 0x23, "the platform must be shut down first"
    UPDATE_FAILED = 0x24, "the firmware update failed"
    RESTORE_REQUIRED = 0x25, "the committed firmware must be restored"
    RMP_INITIALIZATION_FAILED = 0x26, "the RMP could not be initialised"
    INVALID_KEY = 0x27, "the key is not valid"


def refusal(status: Status, found: str) -> PspError:
    """The error to raise for a status: its name, number and sentence, and what was found.

    Its facts are status and found.
    """
    return PspError(
        f"{status.name} ({status:#04x}): {status.sentence}; found {found}",
        status=status,
        found=found,
    )


def refuse_first(*checks: tuple[object, Status, str]) -> None:
    """Raise PspError for the first row (wrong, status, found) that is wrong.

    The order of the rows is the firmware's.
    """
    for wrong, status, found in checks:
        if wrong:
            raise refusal(status, found)
