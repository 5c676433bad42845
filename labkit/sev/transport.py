"""How keys and pages travel: the session between an owner or a platform and a secure processor, and the packets under it.

Source: SEV API (AMD 55766) chapter 2 (keys: ECDH on P-384, KDF of SP 800-108, session = wrapped TEK || TIK) and section 6.6 (packets;
SEND and RECEIVE use the same); the KDF is tested with a vector of the crate sev (virtee). Certificates are left out: a public key is
97 bytes of an uncompressed point, and nobody vouches for it.
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

SESSION_SIZE, HEADER_SIZE = (
    128,
    52,
)  # NONCE 16, WRAP_TK 32, WRAP_IV 16, WRAP_MAC 32, POLICY_MAC 32; FLAGS 4, IV 16, MAC 32
LAUNCH_SECRET, SEND_DATA, SEND_VMSA = 1, 2, 3  # the byte that a packet's MAC begins with
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
    """The 128 bytes that hand `keys` and the policy to the owner of `peer`; `fresh` is a nonce and an IV, 16 bytes each."""
    nonce, iv = fresh[:16], fresh[16:32]
    kek, kik = _session_keys(own, peer, nonce)
    wrapped = _ctr(kek, iv, keys.tek + keys.tik)
    return nonce + wrapped + iv + _mac(kik, wrapped) + _mac(keys.tik, policy.to_bytes(4, "little"))


def open_session(
    own: EllipticCurvePrivateKey, peer: bytes, policy: int, session: bytes
) -> TransportKeys:
    """The keys in a session; raises PspError BAD_MEASUREMENT when it is for another key, damaged, or of another policy."""
    nonce, wrapped, iv, mac, policy_mac = (
        session[a:b] for a, b in ((0, 16), (16, 48), (48, 64), (64, 96), (96, 128))
    )
    kek, kik = _session_keys(own, peer, nonce)
    if not hmac.compare_digest(mac, _mac(kik, wrapped)):
        raise refusal(Status.BAD_MEASUREMENT, "a WRAP_MAC of another key, or a damaged session")
    plain = _ctr(kek, iv, wrapped)
    keys = TransportKeys(plain[:16], plain[16:])
    if not hmac.compare_digest(policy_mac, _mac(keys.tik, policy.to_bytes(4, "little"))):
        raise refusal(Status.BAD_MEASUREMENT, f"a POLICY_MAC for another policy than {policy:#x}")
    return keys


def wrap(
    keys: TransportKeys, kind: int, plain: bytes, iv: bytes, measure: bytes = b""
) -> tuple[bytes, bytes]:
    """(header, data) of a packet: AES-128-CTR under the TEK, HMAC-SHA256 under the TIK."""
    data = _ctr(keys.tek, iv, plain)
    return bytes(4) + iv + _packet_mac(keys, kind, bytes(4) + iv, data, measure), data


def unwrap(
    keys: TransportKeys, kind: int, header: bytes, data: bytes, measure: bytes = b""
) -> bytes:
    """The plaintext of a packet; raises PspError: BAD_MEASUREMENT for a wrong MAC, UNSUPPORTED for a compressed packet."""
    if not hmac.compare_digest(header[20:], _packet_mac(keys, kind, header[:20], data, measure)):
        raise refusal(
            Status.BAD_MEASUREMENT, "a packet MAC of other keys, other bytes or another launch"
        )
    if any(header[:4]):
        raise refusal(
            Status.UNSUPPORTED, f"packet flags {header[:4].hex()} (compression is not modelled)"
        )
    return _ctr(keys.tek, header[4:20], data)


def _packet_mac(keys: TransportKeys, kind: int, head: bytes, data: bytes, measure: bytes) -> bytes:
    length = len(data).to_bytes(
        4, "little"
    )  # GUEST_LENGTH and TRANS_LENGTH agree without compression
    return _mac(keys.tik, bytes([kind]) + head + length + length + data + measure)


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(data)


def _kdf(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    """SP 800-108 in counter mode with one HMAC-SHA256, 128 bits out."""
    return _mac(
        key, (1).to_bytes(4, "little") + label + b"\0" + context + (128).to_bytes(4, "little")
    )[:16]


def _session_keys(own: EllipticCurvePrivateKey, peer: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), peer)
    except ValueError as err:
        raise refusal(
            Status.INVALID_CERTIFICATE, f"{len(peer)} bytes are no point of P-384: {err}"
        ) from err
    master = _kdf(own.exchange(ec.ECDH(), point), b"sev-master-secret", nonce)
    return _kdf(master, b"sev-kek"), _kdf(master, b"sev-kik")
