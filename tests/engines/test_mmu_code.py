"""The walker of encrypted guests: its machine code in mmu_code.py is that of mmu.c, as it is now."""

from __future__ import annotations

import hashlib
import importlib.metadata

import pytest
from build_mmu import ROOM, TARGETS, build

from labkit.engines.unicorn.native.mmu_code import COMPILER, MACHINE_CODE, SOURCE_SHA256


def test_that_the_code_was_made_from_this_source() -> None:
    assert hashlib.sha256((ROOM / "mmu.c").read_bytes()).hexdigest() == SOURCE_SHA256, (
        "make mmu builds it anew"
    )


@pytest.mark.parametrize("machine", TARGETS)
def test_that_the_same_compiler_makes_the_same_code(machine: str) -> None:
    if (have := f"ziglang {importlib.metadata.version('ziglang')}") != COMPILER:
        pytest.skip(
            f"the code was made by {COMPILER}, another version may make other code; this is {have}"
        )
    assert build(ROOM / "mmu.c", TARGETS[machine]).hex() == MACHINE_CODE[machine]
