"""How keys and pages travel between an owner or a platform and a secure processor.

There is a session that hands over keys, and packets under those keys. Source: SEV API (AMD 55766)
chapter 2 (keys: ECDH on P-384, KDF of SP 800-108, session = wrapped TEK || TIK) and section 6.6
(packets; SEND and RECEIVE use the same); the KDF is tested with a vector of the crate sev (virtee).
Certificates are left out: a public key is 97 bytes of an uncompressed point, and nobody vouches for
it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, NamedTuple

from labkit.sev.policy import Status, refusal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = [
    "HEADER_SIZE",
    "LAUNCH_SECRET",
    "SEND_DATA",
    "SEND_VMSA",
    "SESSION_SIZE",
    "TransportKeys",
    "make_session",
    "open_session",
    "private_key",
    "public_bytes",
    "unwrap",
    "wrap",
]

# Bytes: NONCE 16, WRAP_TK 32, WRAP_IV 16, WRAP_MAC 32, POLICY_MAC 32
SESSION_SIZE = 128

# Bytes: FLAGS 4, IV 16, MAC 32
HEADER_SIZE = 52

# The byte that a packet's MAC begins with
LAUNCH_SECRET, SEND_DATA, SEND_VMSA = 1, 2, 3

P384_ORDER_BYTES = 48


class TransportKeys(NamedTuple):
    """What two ends share: the encryption key (TEK) and the integrity key (TIK), 16 bytes each."""

    tek: bytes
    tik: bytes


def private_key(seed: bytes) -> EllipticCurvePrivateKey:
    """A P-384 key that follows from a seed, so that a run can be repeated."""
    from cryptography.hazmat.primitives.asymmetric import ec

    number = int.from_bytes(hashlib.shake_256(seed).digest(P384_ORDER_BYTES - 1), "big") | 1
    return ec.derive_private_key(number, ec.SECP384R1())


def public_bytes(key: EllipticCurvePrivateKey) -> bytes:
    """The public half: 97 bytes, 04 || x || y."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def make_session(
    own: EllipticCurvePrivateKey, peer: bytes, keys: TransportKeys, policy: int, fresh: bytes
) -> bytes:
    """The 128 bytes that hand `keys` and the policy to the owner of the public key `peer`.

    `fresh` is a nonce and an IV, 16 bytes each. Raises PspError INVALID_CERTIFICATE for a peer that
    is no public key.
    """
    nonce, iv = fresh[:16], fresh[16:32]
    kek, kik = _session_keys(own, peer, nonce)
    wrapped = _ctr(kek, iv, keys.tek + keys.tik)
    return nonce + wrapped + iv + _mac(kik, wrapped) + _policy_mac(keys, policy)


def open_session(
    own: EllipticCurvePrivateKey, peer: bytes, policy: int, session: bytes
) -> TransportKeys:
    """The keys in a session that the owner of the public key `peer` made.

    Raises PspError BAD_MEASUREMENT when it is for another key, damaged, or of another policy, and
    INVALID_CERTIFICATE for a peer that is no public key.
    """
    nonce = session[0:16]
    wrapped = session[16:48]
    iv = session[48:64]
    mac = session[64:96]
    policy_mac = session[96:128]

    kek, kik = _session_keys(own, peer, nonce)
    if not hmac.compare_digest(mac, _mac(kik, wrapped)):
        raise refusal(Status.BAD_MEASUREMENT, "a WRAP_MAC of another key, or a damaged session")
    plain = _ctr(kek, iv, wrapped)
    keys = TransportKeys(plain[:16], plain[16:])
    if not hmac.compare_digest(policy_mac, _policy_mac(keys, policy)):
        raise refusal(Status.BAD_MEASUREMENT, f"a POLICY_MAC for another policy than {policy:#x}")
    return keys


def wrap(
    keys: TransportKeys, kind: int, plain: bytes, iv: bytes, measure: bytes = b""
) -> tuple[bytes, bytes]:
    """(header, data) of a packet: AES-128-CTR under the TEK, HMAC-SHA256 under the TIK.

    kind is LAUNCH_SECRET, SEND_DATA or SEND_VMSA; a LAUNCH_SECRET is for one launch, whose
    `measure` is part of the MAC. iv has 16 bytes.
    """
    data = _ctr(keys.tek, iv, plain)
    head = bytes(4) + iv
    return head + _packet_mac(keys, kind, head, data, measure), data


def unwrap(
    keys: TransportKeys, kind: int, header: bytes, data: bytes, measure: bytes = b""
) -> bytes:
    """The plaintext of a packet.

    Raises PspError BAD_MEASUREMENT for a wrong MAC, UNSUPPORTED for a compressed packet.
    """
    flags, iv, head, mac = header[:4], header[4:20], header[:20], header[20:]
    if not hmac.compare_digest(mac, _packet_mac(keys, kind, head, data, measure)):
        raise refusal(
            Status.BAD_MEASUREMENT, "a packet MAC of other keys, other bytes or another launch"
        )
    if any(flags):
        raise refusal(
            Status.UNSUPPORTED, f"packet flags {flags.hex()} (compression is not modelled)"
        )
    return _ctr(keys.tek, iv, data)


def _packet_mac(keys: TransportKeys, kind: int, head: bytes, data: bytes, measure: bytes) -> bytes:
    # Without compression GUEST_LENGTH and TRANS_LENGTH agree
    length = len(data).to_bytes(4, "little")
    return _mac(keys.tik, bytes([kind]) + head + length + length + data + measure)


def _policy_mac(keys: TransportKeys, policy: int) -> bytes:
    return _mac(keys.tik, policy.to_bytes(4, "little"))


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(data)


def _kdf(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    """SP 800-108 in counter mode with one HMAC-SHA256, 128 bits out."""
    counter, nr_bits = (1).to_bytes(4, "little"), (128).to_bytes(4, "little")
    return _mac(key, counter + label + b"\0" + context + nr_bits)[:16]


def _session_keys(own: EllipticCurvePrivateKey, peer: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """(KEK, KIK), which both ends of a session can make."""
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), peer)
    except ValueError as err:
        raise refusal(
            Status.INVALID_CERTIFICATE, f"{len(peer)} bytes are no point of P-384: {err}"
        ) from err
    master = _kdf(own.exchange(ec.ECDH(), point), b"sev-master-secret", nonce)
    return _kdf(master, b"sev-kek"), _kdf(master, b"sev-kik")
