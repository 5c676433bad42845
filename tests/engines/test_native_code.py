"""Machine code in the package is that of the C files beside it, as they are now."""

from __future__ import annotations

from types import ModuleType

import pytest
from build_native import SOURCES, TARGETS, Source, compiler

from labkit.engines.unicorn.native import mmu_code, stubs_code

CODE = {"mmu": mmu_code, "stubs": stubs_code}
BOTH = [pytest.param(source, CODE[source.name], id=source.name) for source in SOURCES]


@pytest.mark.parametrize(("source", "code"), BOTH)
def test_that_the_code_was_made_from_this_source(source: Source, code: ModuleType) -> None:
    assert source.sha256 == code.SOURCE_SHA256, "make native builds it anew"


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize(("source", "code"), BOTH)
def test_that_the_same_compiler_makes_the_same_code(
    source: Source, code: ModuleType, machine: str
) -> None:
    if (have := compiler()) != code.COMPILER:
        pytest.skip(
            f"the code was made by {code.COMPILER}, another version may make other code; this is {have}"
        )
    for function, built in source.build(machine).items():
        assert built.hex() == code.MACHINE_CODE[function, machine]
