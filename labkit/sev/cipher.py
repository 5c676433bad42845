"""The memory controller's cipher: AES-128 in XEX or XE form, one key per VM, tweaked by the system physical address.

The form and the tweak (XOR of one 16-byte constant per set address bit) are those that Du et al., "Secure Encrypted Virtualization
is Unsecure" (2017), and Wilke et al., "SEVurity" (2020), found on real parts. The constants are this model's own: real
ones differ per part or per boot and are secret. There is no integrity: what was written garbles or replays, it is never refused.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.bits import is_aligned
from labkit.errors import InvalidState

__all__ = ["BLOCK", "CONSTANTS", "MemoryCipher", "tweaks"]

BLOCK, PAGE, CHUNK, LIMIT = (
    16,
    4096,
    16 * 4096,
    1 << 52,
)  # bytes; a chunk and its tweaks stay in the processor's cache
Words = NDArray[np.uint64]  # blocks, two words each
_LOW, _GROUPS, _BITS = 4, 6, 8  # address bits 4..51, looked up eight at a time
CONSTANTS: Words = np.frombuffer(
    hashlib.shake_256(b"labkit's own tweak constants").digest(BLOCK * _GROUPS * _BITS), "<u8"
).reshape(-1, 2)


def _table(constants: Words) -> Words:
    table = np.zeros((1 << _BITS, 2), np.uint64)
    for bit, constant in enumerate(constants):
        table[1 << bit : 2 << bit] = table[: 1 << bit] ^ constant
    return table


_TABLES = tuple(_table(CONSTANTS[_BITS * g : _BITS * (g + 1)]) for g in range(_GROUPS))


def tweaks(spas: Words) -> Words:
    """T(spa) of 16-byte blocks at these system physical addresses, shape (n, 2): XOR of CONSTANTS[i - 4] over the set bits i >= 4."""
    total: Words = _TABLES[0][spas >> _LOW & 0xFF]
    top = int(spas.max(initial=0))
    for group, table in enumerate(_TABLES[1:], 1):
        shift = _LOW + _BITS * group
        if not top >> shift:
            break
        total ^= table[spas >> shift & 0xFF]
    return total


_IN_CHUNK = tweaks(
    np.arange(0, CHUNK, BLOCK, dtype=np.uint64)
)  # of the first one: another differs from it by one constant


@lru_cache(1 << 12)
def _constant(chunk: int) -> NDArray[np.complex128]:
    """What the tweaks of the chunk with this number have and those of the first have not: 16 bytes as one element, never computed with."""
    return tweaks(np.array([chunk * CHUNK], np.uint64)).view(np.complex128)


class MemoryCipher:
    """Encrypts and decrypts 16-byte blocks at system physical addresses with one VM's 16-byte key (not for threads)."""

    def __init__(self, key: bytes, form: str = "XEX") -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        if len(key) != 16 or form not in ("XE", "XEX"):
            raise InvalidState(
                f"a memory key has 16 bytes and the form is XE or XEX, not {len(key)} bytes and {form!r}"
            )
        self.key, self.form = bytes(key), form
        ecb = Cipher(
            algorithms.AES(key), modes.ECB()
        )  # ECB keeps no state: one context serves every call
        self._encrypt, self._decrypt = ecb.encryptor(), ecb.decryptor()
        self._tweak, self._mixed = np.empty(
            (2, CHUNK // BLOCK, 2), np.uint64
        )  # buffers for one chunk: allocating costs more than AES
        self._done = bytearray(CHUNK + BLOCK)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryCipher:
        return self  # nothing in it changes

    def encrypt(self, spa: int, data: bytes | bytearray | memoryview) -> bytes:
        """Ciphertext of data at spa, both multiples of 16; raises InvalidState when they are not."""
        out = bytearray(len(data))
        self.encrypt_into(spa, data, out)
        return bytes(out)

    def decrypt(self, spa: int, data: bytes | bytearray | memoryview) -> bytes:
        """Plaintext of data at spa, both multiples of 16; raises InvalidState when they are not."""
        out = bytearray(len(data))
        self.decrypt_into(spa, data, out)
        return bytes(out)

    def encrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Encrypt from one buffer into another or itself, in chunks: needs no memory of its own that grows."""
        self._into(True, spa, data, out)

    def decrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Decrypt from one buffer into another or itself, in chunks: needs no memory of its own that grows."""
        self._into(False, spa, data, out)

    def _into(self, encrypts: bool, spa: int, data: Any, out: Any) -> None:
        source, target = memoryview(data).cast("B"), memoryview(out).cast("B")
        size = len(source)
        if not is_aligned(spa | size, BLOCK) or not 0 <= spa <= LIMIT - size or size != len(target):
            raise InvalidState(
                f"encryption takes whole 16-byte blocks below 2^52: not {size:#x} bytes at spa {spa:#x}, "
                f"into {len(target):#x}",
                spa=spa,
                size=size,
            )
        at = 0
        while at < size:
            chunk, skip = divmod(spa + at, CHUNK)
            end = min(size, at + CHUNK - skip)
            blocks, made = (
                np.frombuffer(view[at:end], "<u8").reshape(-1, 2) for view in (source, target)
            )
            self._crypt(encrypts, self._tweaks(chunk, skip // BLOCK, len(blocks)), blocks, made)
            at = end

    def _tweaks(self, chunk: int, first: int, nr_blocks: int) -> Words:
        """Those of blocks inside one chunk, until it is called again."""
        tweak = self._tweak[:nr_blocks]
        tweak.view(np.complex128)[:] = _constant(chunk)
        return np.bitwise_xor(tweak, _IN_CHUNK[first : first + nr_blocks], out=tweak)

    def _crypt(self, encrypts: bool, tweak: Words, blocks: Words, out: Words) -> None:
        """XE is C = E(P ^ T), XEX is C = E(P ^ T) ^ T: only XE leaves out the XOR on the ciphertext's side."""
        both = self.form == "XEX"
        nr_bytes, engine = blocks.nbytes, self._encrypt if encrypts else self._decrypt
        mixed = (
            np.bitwise_xor(blocks, tweak, out=self._mixed[: len(blocks)])
            if both or encrypts
            else np.ascontiguousarray(blocks)
        )
        engine.update_into(mixed.data.cast("B"), self._done)
        done = np.frombuffer(self._done, "<u8", nr_bytes // 8).reshape(-1, 2)
        np.bitwise_xor(done, tweak if both or not encrypts else np.uint64(0), out=out)
