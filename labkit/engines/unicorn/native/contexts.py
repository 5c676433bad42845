"""What of a saved CPU state is this process's own, and what is believed of one that is put back.

A context of libunicorn is a head (its size, and pointers to the engine's memory) and QEMU's CPU
state, which has pointers too. They mean something in the engine that saved them alone; put into
another one, or changed on the way, they end the process. So they are never taken from a state:
where a new engine has a pointer, the engine that takes the state keeps its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Protocol

from labkit.engines.unicorn.native.lib import Handle
from labkit.errors import InvalidState

__all__ = ["accepted", "pack_state", "unpack_state", "with_own_pointers"]

MAGIC = b"LKU2"
DIGEST = 16  # bytes
_HEAD = Struct(f"<4s{DIGEST}sI")

# struct uc_context (uc_priv.h of Unicorn 2.1): size_t context_size; uc_mode mode; uc_arch arch;
# int snapshot_level; bool ramblock_freed; RAMBlock *last_block; FlatView *fv. Then QEMU's state.
CONTEXT_HEAD = 40
MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
LOWEST = 1 << 16  # nothing is mapped below, and small numbers are no pointers


def pack_state(facts: bytes, context: bytes) -> bytes:
    """A state as bytes: what labkit keeps beside, then libunicorn's, under a digest of both."""
    return _HEAD.pack(MAGIC, _digest(facts, context), len(facts)) + facts + context


def unpack_state(state: bytes) -> tuple[bytes, bytes]:
    """Both parts; raises InvalidState for bytes that are no state, or not as they were saved."""
    if len(state) < _HEAD.size or state[:4] != MAGIC:
        raise InvalidState("not a CPU state of the unicorn engine")
    _, digest, size = _HEAD.unpack_from(state)
    facts = state[_HEAD.size : _HEAD.size + size]
    context = state[_HEAD.size + size :]
    if _digest(facts, context) != digest:
        raise InvalidState("a CPU state that is not as it was saved: its digest is another")
    return facts, context


def _digest(facts: bytes, context: bytes) -> bytes:
    found = hashlib.blake2b(facts, digest_size=DIGEST)
    found.update(context)
    return found.digest()


class _Judge(Protocol):
    """What an instruction set knows of its contexts."""

    def strange_state(self, context: bytes) -> str: ...


def accepted(
    handle: Handle,
    arch: str,
    kind: tuple[int, int],
    judge: _Judge,
    facts: Mapping[str, object],
    context: bytes,
) -> bytes:
    """The context as this engine may take it; raises InvalidState for one that it may not.

    kind is the (arch, mode) of libunicorn.
    """
    if facts["arch"] != arch:
        raise InvalidState(f"a CPU state of {facts['arch']} for a vCPU of {arch}")
    context = with_own_pointers(handle, kind, context)
    strange = judge.strange_state(context)
    if strange:
        raise InvalidState(f"a CPU state that no guest can have: {strange}")
    return context


def with_own_pointers(handle: Handle, kind: tuple[int, int], context: bytes) -> bytes:
    """A context with the pointers of the engine that takes it; kind is its (arch, mode).

    Raises InvalidState for one of another length.
    """
    if len(context) != handle.context_size:
        raise InvalidState(
            f"a CPU state of {len(context)} bytes for an engine whose states have "
            f"{handle.context_size}"
        )
    mine = handle.context()
    taken = bytearray(context)
    taken[:CONTEXT_HEAD] = mine[:CONTEXT_HEAD]
    for at in _pointers(kind, len(mine)):
        taken[at : at + 8] = mine[at : at + 8]
    return bytes(taken)


@cache
def _pointers(kind: tuple[int, int], size: int) -> tuple[int, ...]:
    """Where in the contexts of such engines pointers of this process lie.

    They are found in an engine that never had a guest, whose registers are no addresses of ours.
    """
    fresh = Handle(*kind)
    context = fresh.context()
    ranges = [
        (int(first, 16), int(end, 16))
        for first, end in MAPPED.findall(Path("/proc/self/maps").read_text())
    ]
    found = [
        at
        for at in range(CONTEXT_HEAD, size - 7, 8)
        if _is_mapped(int.from_bytes(context[at : at + 8], "little"), ranges)
    ]
    fresh.close()
    return tuple(found)


def _is_mapped(word: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return word >= LOWEST and any(first <= word < end for first, end in ranges)
