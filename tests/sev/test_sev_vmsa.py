"""The VM save area: labkit's registers in the manual's layout, sealed with the guest's key."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.errors import InvalidState
from labkit.sev.cipher import MemoryCipher
from labkit.sev.cpu import encryption_leaf, sev_status
from labkit.sev.vmsa import VMSA, VMSA_SIZE, vmsa_page, vmsa_registers

CIPHER, SPA = MemoryCipher(bytes(range(16))), 0x77000
LIMITS = {field: 1 << 8 * size for field, (_, size) in VMSA.fields.items()}
some_names = st.lists(st.sampled_from(sorted(LIMITS)), unique=True)
some_registers = some_names.flatmap(
    lambda ns: st.fixed_dictionaries({n: st.integers(0, LIMITS[n] - 1) for n in ns})
)


@pytest.fixture(scope="module")
def regs() -> dict[str, int]:
    """The registers of a vCPU as labkit boots it."""
    program = lk.Program.compile('#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }\n')
    with lk.Vm.create(program) as vm:
        return {name: int(value) for name, value in vm.machine.vcpus[0].get_regs().items()}


def test_that_a_booted_vcpu_survives_its_save_area(regs: dict[str, int]) -> None:
    back = vmsa_registers(vmsa_page(regs))
    lost = set(regs) - set(back)
    assert not lost & {
        "rip",
        "rsp",
        "rflags",
        "cr0",
        "cr3",
        "cr4",
        "efer",
        "cs",
        "tr",
        "gdt_base",
        "xmm15",
        "mxcsr",
        "fs_base",
    }
    assert {name: back[name] for name in regs if name in back} == {
        name: value for name, value in regs.items() if name in back
    }
    assert lost <= {"cr8", "tsc_offset", "tsc_adjust"}


def test_that_flat_segments_get_the_attributes_of_svm(regs: dict[str, int]) -> None:
    page = vmsa_page(regs)
    assert [VMSA.get(page, f"{name}_attrib") for name in ("cs", "ss", "tr")] == [0xA9B, 0xC93, 0x8B]
    assert VMSA.get(page, "cpl") == 0 and VMSA.get(page, "cs_limit") == 0xFFFFFFFF


@settings(deadline=None)
@given(some_registers)
def test_that_every_field_has_a_place_of_its_own(some: dict[str, int]) -> None:
    page = vmsa_page(some)
    assert {field: VMSA.get(page, field) for field in some} == some


@pytest.mark.parametrize(
    ("regs", "level"), [({"cs": 8}, 0), ({"cs": 0x2B}, 3), ({"cs": 0x2B, "cpl": 1}, 1)]
)
def test_that_the_ring_is_kept_beside_the_selector(regs: dict[str, int], level: int) -> None:
    assert vmsa_registers(vmsa_page(regs))["cpl"] == level


@pytest.mark.parametrize(
    ("protect", "eax", "status"), [("sev", 0x402, 1), ("sev-es", 0x40A, 3), ("snp", 0x41A, 7)]
)
@pytest.mark.parametrize("c_bit", [47, 51])
def test_that_the_cpu_says_where_the_c_bit_is(
    protect: str, eax: int, status: int, c_bit: int
) -> None:
    assert encryption_leaf(protect, c_bit, 5, 15, 8) == (eax, c_bit | 5 << 6, 15, 8)
    assert sev_status(protect) == status


@pytest.mark.parametrize(
    ("protect", "c_bit", "reduction"),
    [
        ("sev", 31, 0),
        ("sev", 64, 0),
        ("sev", 47, 64),
        ("sev", 47, -1),
        ("tdx", 47, 0),
    ],
)
def test_that_a_c_bit_lies_above_addresses(protect: str, c_bit: int, reduction: int) -> None:
    with pytest.raises(InvalidState, match="C-bit"):
        encryption_leaf(protect, c_bit, reduction)


def test_that_fields_do_not_overlap() -> None:
    used = [byte for offset, size in VMSA.fields.values() for byte in range(offset, offset + size)]
    assert len(used) == len(set(used)) and max(used) == 0x670 - 1


def test_that_the_host_sees_nothing_and_its_write_garbles_a_block() -> None:
    page = bytearray(CIPHER.encrypt(SPA, vmsa_page({"rip": 0x401000, "rax": 0xDEAD})))
    assert (0x401000).to_bytes(8, "little") not in page and len(page) == VMSA_SIZE
    page[VMSA.fields["rax"][0]] ^= 1
    after = vmsa_registers(CIPHER.decrypt(SPA, page))
    assert after["rip"] == 0x401000 and after["rax"] != 0xDEAD


@pytest.mark.parametrize(
    ("regs", "name"),
    [({"rax": 1 << 64}, "rax"), ({"cs": 1 << 16}, "cs_selector"), ({"cr0": -1}, "cr0")],
)
def test_that_a_value_too_wide_is_refused(regs: dict[str, int], name: str) -> None:
    with pytest.raises(InvalidState, match=name):
        vmsa_page(regs)


def test_that_a_page_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidState, match="one page, not 100 bytes"):
        vmsa_registers(bytes(100))
