"""The ucall pool in words: the figures, one slot in a sentence, and one character per slot."""

from __future__ import annotations

import numpy as np

from labkit.outside import plain
from labkit.ucall.snapshot import PoolSnapshot, Slot
from labkit.words import num

__all__ = ["DIGITS", "STATE", "about", "counts", "marks", "owner", "slot_at", "status", "taken"]

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a vCPU as one character
STATE = {
    "free": "free",
    "held": "in use",
    "done": "held by a DONE ucall",
    "leaked": "leaked, its vCPU is done",
}


def counts(pool: PoolSnapshot) -> str:
    """The figures in words: "6 of 512 in use, 3 of them leaked; 2 changed since step 1 180"."""
    words = f"{num(int(pool.in_use.sum()))} of {num(pool.nr_slots)} in use"
    nr_leaked = int(pool.leaked.sum())
    if nr_leaked:
        words += f", {num(nr_leaked)} of them leaked"
    if pool.changed_since is None:
        return words
    nr_changed = int(pool.changed.sum())
    changed = num(nr_changed) if nr_changed else "none"
    return f"{words}; {changed} changed since step {num(pool.changed_since)}"


def status(pool: PoolSnapshot, chosen: int | None = None) -> str:
    """The status sentence: the chosen slot, or the counts."""
    if chosen is None:
        return f"{counts(pool)}."
    slot = slot_at(pool, chosen)
    if slot is None:
        return f"Slot {chosen} is free, never used."
    if slot.state == "free":
        return f"Slot {chosen} is free, used {pool.uses[chosen]} times."
    return f"Slot {chosen}, {about(slot)}."


def marks(pool: PoolSnapshot) -> str:
    """One character per slot.

    . free, the owner's digit (? unknown), x leaked, D held by a DONE ucall.
    """
    known = (pool.owner >= 0) & (pool.owner < len(DIGITS))
    digits = np.array(list(DIGITS))[np.where(known, pool.owner, 0)]
    out = np.where(known, digits, "?")
    out = np.where(pool.done, "D", out)
    out = np.where(pool.leaked, "x", out)
    return "".join(np.where(pool.in_use, out, ".").tolist())


def taken(pool: PoolSnapshot) -> list[Slot]:
    """The slots that are not free, by index."""
    return [slot for slot in pool.held if slot.state != "free"]


def slot_at(pool: PoolSnapshot, index: int) -> Slot | None:
    """A slot by its index, None for one that was never used."""
    return next((slot for slot in pool.held if slot.index == index), None)


def owner(slot: Slot) -> str:
    """Who took a slot."""
    return "owner unknown" if slot.vcpu is None else f"vCPU {slot.vcpu}"


def about(slot: Slot) -> str:
    """A slot that is not free: who took it, for what, since when, and why it is still held."""
    words = f"{owner(slot)}, {plain(slot.cmd, 20)}"
    if slot.text:
        words += f' "{plain(slot.text, 60)}"'
    if slot.since is not None:
        words += f", since step {num(slot.since)}"
    if slot.state == "done":
        words += ", held by design"
    elif slot.state == "leaked":
        words += ", leaked"
    return words
