"""The memory controller's cipher: AES-128 in XEX or XE form, one key per VM.

It is tweaked by the system physical address. The form and the tweak (XOR of one 16-byte constant
per set address bit) are those that Du et al., "Secure Encrypted Virtualization is Unsecure" (2017),
and Wilke et al., "SEVurity" (2020), found on real parts. The constants are this model's own: real
ones differ per part or per boot and are secret. There is no integrity: what was written garbles or
replays, it is never refused.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from labkit.bits import is_aligned
from labkit.errors import InvalidState
from labkit.machine.memory import PAGE

__all__ = ["BLOCK", "CONSTANTS", "MemoryCipher", "tweaks"]

# Bytes; a chunk and its tweaks stay in the processor's cache
BLOCK = 16
CHUNK = 16 * PAGE

# Of system physical addresses
LIMIT = 1 << 52

# Buffers to read and to write
Source = bytes | bytearray | memoryview
Target = bytearray | memoryview

# Blocks or tweaks, two words each: shape (n, 2)
Words = NDArray[np.uint64]

# Address bits 4..51, looked up eight at a time in one of six tables
_LOW, _GROUPS, _BITS = 4, 6, 8

CONSTANTS: Words = np.frombuffer(
    hashlib.shake_256(b"labkit's own tweak constants").digest(BLOCK * _GROUPS * _BITS), "<u8"
).reshape(-1, 2)


def _table(constants: Words) -> Words:
    """The XOR of every subset of eight constants, by the byte whose bits choose them."""
    table = np.zeros((1 << _BITS, 2), np.uint64)
    for bit, constant in enumerate(constants):
        table[1 << bit : 2 << bit] = table[: 1 << bit] ^ constant
    return table


_TABLES = tuple(_table(CONSTANTS[_BITS * g : _BITS * (g + 1)]) for g in range(_GROUPS))


def tweaks(spas: Words) -> Words:
    """T(spa) of 16-byte blocks at these system physical addresses, shape (n, 2).

    T(spa) is the XOR of CONSTANTS[i - 4] over the set bits i >= 4 of spa.
    """
    total: Words = _TABLES[0][spas >> _LOW & 0xFF]
    top = int(spas.max(initial=0))
    for group, table in enumerate(_TABLES[1:], 1):
        shift = _LOW + _BITS * group
        if not top >> shift:
            break
        total ^= table[spas >> shift & 0xFF]
    return total


# Of the first chunk's blocks: those of another chunk all differ from them by one constant
_IN_CHUNK = tweaks(np.arange(0, CHUNK, BLOCK, dtype=np.uint64))


@lru_cache(1 << 12)
def _constant(chunk: int) -> NDArray[np.complex128]:
    """What the tweaks of the chunk with this number have and those of the first have not.

    These are 16 bytes as one element, never computed with.
    """
    return tweaks(np.array([chunk * CHUNK], np.uint64)).view(np.complex128)


class MemoryCipher:
    """Encrypts and decrypts 16-byte blocks at system physical addresses with one VM's key.

    The key has 16 bytes, the form is "XEX" or "XE"; raises InvalidState for others. It is not for
    threads: calls share buffers.
    """

    def __init__(self, key: bytes, form: str = "XEX") -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        if len(key) != 16 or form not in ("XE", "XEX"):
            raise InvalidState(
                f"a memory key has 16 bytes and the form is XE or XEX, "
                f"not {len(key)} bytes and {form!r}"
            )
        self.key = bytes(key)
        self.form = form

        # ECB keeps no state: one context serves every call
        ecb = Cipher(algorithms.AES(key), modes.ECB())
        self._encrypt = ecb.encryptor()
        self._decrypt = ecb.decryptor()

        # Buffers for one chunk: allocating costs more than AES
        self._tweak = np.empty((CHUNK // BLOCK, 2), np.uint64)
        self._mixed = np.empty((CHUNK // BLOCK, 2), np.uint64)
        self._done = bytearray(CHUNK + BLOCK)

    def __deepcopy__(self, memo: dict[int, object]) -> MemoryCipher:
        """For snapshots: nothing in it changes."""
        return self

    def encrypt(self, spa: int, data: Source) -> bytes:
        """Ciphertext of data at spa.

        Raises InvalidState where address or length is no multiple of 16.
        """
        out = bytearray(len(data))
        self.encrypt_into(spa, data, out)
        return bytes(out)

    def decrypt(self, spa: int, data: Source) -> bytes:
        """Plaintext of data at spa.

        Raises InvalidState where address or length is no multiple of 16.
        """
        out = bytearray(len(data))
        self.decrypt_into(spa, data, out)
        return bytes(out)

    def encrypt_into(self, spa: int, data: Source, out: Target) -> None:
        """Encrypt from one buffer into another of the same length, or into itself.

        It goes in chunks and needs no memory of its own that grows. Raises InvalidState where
        address or length is no multiple of 16, or the lengths differ.
        """
        self._into(True, spa, data, out)

    def decrypt_into(self, spa: int, data: Source, out: Target) -> None:
        """Decrypt from one buffer into another of the same length, or into itself.

        It goes in chunks and needs no memory of its own that grows. Raises InvalidState where
        address or length is no multiple of 16, or the lengths differ.
        """
        self._into(False, spa, data, out)

    def _into(self, encrypts: bool, spa: int, data: Source, out: Target) -> None:
        source = memoryview(data).cast("B")
        target = memoryview(out).cast("B")
        size = len(source)
        if not is_aligned(spa | size, BLOCK) or not 0 <= spa <= LIMIT - size or size != len(target):
            raise InvalidState(
                f"encryption takes whole 16-byte blocks below 2^52: "
                f"not {size:#x} bytes at spa {spa:#x}, into {len(target):#x}",
                spa=spa,
                size=size,
            )
        at = 0
        while at < size:
            chunk, skip = divmod(spa + at, CHUNK)
            end = min(size, at + CHUNK - skip)
            blocks = np.frombuffer(source[at:end], "<u8").reshape(-1, 2)
            made = np.frombuffer(target[at:end], "<u8").reshape(-1, 2)
            tweak = self._tweaks(chunk, skip // BLOCK, len(blocks))
            self._crypt(encrypts, tweak, blocks, made)
            at = end

    def _tweaks(self, chunk: int, first: int, nr_blocks: int) -> Words:
        """Those of blocks inside one chunk, until it is called again."""
        tweak = self._tweak[:nr_blocks]
        tweak.view(np.complex128)[:] = _constant(chunk)
        return np.bitwise_xor(tweak, _IN_CHUNK[first : first + nr_blocks], out=tweak)

    def _crypt(self, encrypts: bool, tweak: Words, blocks: Words, out: Words) -> None:
        """XE is C = E(P ^ T), XEX is C = E(P ^ T) ^ T: XE has no XOR on the ciphertext's side."""
        both = self.form == "XEX"
        if both or encrypts:
            mixed = np.bitwise_xor(blocks, tweak, out=self._mixed[: len(blocks)])
        else:
            mixed = np.ascontiguousarray(blocks)

        engine = self._encrypt if encrypts else self._decrypt
        engine.update_into(mixed.data.cast("B"), self._done)
        done = np.frombuffer(self._done, "<u8", blocks.nbytes // 8).reshape(-1, 2)

        if both or not encrypts:
            np.bitwise_xor(done, tweak, out=out)
        else:
            out[:] = done
