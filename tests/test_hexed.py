"""Tables show addresses in hexadecimal and keep them as numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from paths import GUESTS

import labkit as lk
from labkit.hexed import ADDRESSES, HexFrame


@pytest.fixture
def frame():
    with lk.Vm.create(GUESTS / "hello.elf") as vm:
        yield vm.page_table().df


def test_that_addresses_are_shown_in_hexadecimal_everywhere(frame):
    gva = int(frame.gva.iloc[3])
    for shown in (
        repr(frame),
        frame._repr_html_(),
        frame.to_string(),
        frame.to_html(),
        repr(frame.gva),
        repr(frame.iloc[3]),
        repr(frame[frame.gva == gva][["what", "gva"]]),
        repr(frame.sort_values("nr_pages").set_index("gva")),
        repr(frame.groupby("what").gva.min()),
    ):
        assert f"{gva:#x}" in shown
        assert str(gva) not in shown


def test_that_they_are_numbers_to_compute_with(frame):
    assert frame.gva.dtype == np.uint64
    assert ((frame.gva_end - frame.gva + np.uint64(1)) // frame.page_size == frame.nr_pages).all()
    assert frame.gva.max() + 1 > 0x400000
    assert frame.to_csv().splitlines()[1].startswith("0,8192,")


def test_that_the_rest_is_shown_as_pandas_does(frame):
    plain = pd.DataFrame(frame).drop(columns=list(ADDRESSES & set(frame.columns)))
    kept = HexFrame(frame).drop(columns=list(ADDRESSES & set(frame.columns)))
    assert repr(kept) == repr(plain)
    assert kept._repr_html_() == plain._repr_html_()
    assert repr(frame.gva).endswith("dtype: uint64")


def test_that_a_name_of_a_guest_makes_no_html():
    frame = HexFrame({"gva": [1], "what": ["<script>"]})
    assert "<script>" not in frame._repr_html_()


def test_that_what_is_no_number_is_shown_as_it_is():
    frame = HexFrame({"gva": [None, 4096, pd.NA], "gpa": [0x1000, 0x2000, 0x3000]})
    text = frame.to_string()
    assert "None" in text and "0x1000" in text and "<NA>" in text


def test_that_pandas_own_options_hold_and_stay(frame):
    many = HexFrame({"gva": np.arange(1000, dtype=np.uint64)})
    with pd.option_context("display.max_rows", 10):
        assert repr(many).count("\n") < 20
        assert "1000 rows" in many._repr_html_()
    assert "0x" not in repr(pd.DataFrame({"gva": [4096]}))


@pytest.mark.parametrize(
    "of",
    [
        lambda vm: vm.page_table().df,
        lambda vm: vm.page_table().leaves,
        lambda vm: vm.page_table().diff(vm.page_table()),
        lambda vm: vm.pool.slots,
        lambda vm: vm.encryption_map().df,
    ],
)
def test_that_every_table_with_addresses_is_one(of):
    with lk.Vm.create(GUESTS / "secret.elf", protect="snp") as vm:
        assert isinstance(of(vm), HexFrame)
