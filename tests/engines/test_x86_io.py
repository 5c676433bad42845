"""IN, OUT, INS and OUTS in all their encodings."""

from __future__ import annotations

import pytest

import labkit as lk
from labkit.engines.exits import PioExit

FORMS = [  # bytes, exit with DX 0x1234 and RAX 0x1122334455667788
    ("ec", PioExit(0x1234, 1, False, 0)),
    ("66ed", PioExit(0x1234, 2, False, 0)),
    ("ed", PioExit(0x1234, 4, False, 0)),
    ("67ed", PioExit(0x1234, 4, False, 0)),
    ("664fed", PioExit(0x1234, 2, False, 0)),
    ("f3ec", PioExit(0x1234, 1, False, 0)),
    ("e4ec", PioExit(0xEC, 1, False, 0)),
    ("66e580", PioExit(0x80, 2, False, 0)),
    ("e766", PioExit(0x66, 4, True, 0x55667788)),
    ("ee", PioExit(0x1234, 1, True, 0x88)),
    ("64ee", PioExit(0x1234, 1, True, 0x88)),
    ("2e66ef", PioExit(0x1234, 2, True, 0x7788)),
]


@pytest.fixture(scope="module")
def program():
    functions = (
        f'void io_{code}(void) {{ asm volatile(".byte {", ".join(f"0x{b:x}" for b in bytes.fromhex(code))}" :: '
        f'"a"(0x1122334455667788), "d"(0x1234)); GUEST_DONE(); }}'
        for code, _ in FORMS
    )
    return lk.Program.compile('#include "labkit.h"\n' + "\n".join(functions))


@pytest.mark.parametrize("code, wanted", FORMS)
def test_that_an_encoding_of_in_and_out_is_understood(program, code, wanted):
    vm = lk.Vm.create(program, f"io_{code}")
    assert vm.vcpus[0].run(1000) == wanted and vm.vcpus[0].run(1000).cmd == "DONE"
    vm.close()
