"""GUEST_PRINTF's formatting, built natively, against the C library and the kernel's own."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import REPO

LIBRARY = REPO / "labkit" / "guest" / "lib"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """guest_snprintf() as a function of this process.

    `aborted` counts what would have been ABORT ucalls.
    """
    source = """#include "labkit.h"
int aborted;
void ucall_assert(u64 cmd, const char *exp, const char *file, unsigned int line,
		const char *fmt, ...)
{
	aborted++;
}
"""
    folder = tmp_path_factory.mktemp("printf")
    return shared_library(
        folder, source, f"-I{LIBRARY}", LIBRARY / "printf.c", LIBRARY / "string.c"
    )


def shared_library(folder, source, *more):
    (folder / "stub.c").write_text(source)
    command = [
        "gcc",
        "-w",
        "-O1",
        "-fPIC",
        "-shared",
        "-fno-builtin",
        "-o",
        "lib.so",
        "stub.c",
        *map(str, more),
    ]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no gcc to build it natively: {error}")
    return ctypes.CDLL(str(folder / "lib.so"))


KERNEL_HEADER = """#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <setjmp.h>
extern jmp_buf out;
#define GUEST_ASSERT(x) do { if (!(x)) longjmp(out, 1); } while (0)
"""
KERNEL_WRAPPER = """#include "ucall_common.h"
jmp_buf out;
int guest_vsnprintf(char *, int, const char *, va_list);
int checked(char *buf, int n, const char *fmt, ...)
{
	va_list args;
	va_start(args, fmt);
	return setjmp(out) ? -1 : guest_vsnprintf(buf, n, fmt, args);
}
"""


@pytest.fixture(scope="module")
def kernels(selftests, tmp_path_factory):
    """guest_vsnprintf() of the kernel selftests themselves, a failed assertion being -1."""
    folder = tmp_path_factory.mktemp("kernel")
    for name in ("test_util.h", "kvm_util.h", "ucall_common.h"):
        (folder / name).write_text(KERNEL_HEADER)
    return shared_library(
        folder, KERNEL_WRAPPER, f"-I{folder}", selftests / "lib" / "guest_sprintf.c"
    )


def formatted(function, fmt, args, room=512):
    buffer = ctypes.create_string_buffer(b"\xaa" * (room + 64), room + 64)
    length = function(buffer, room, fmt.encode(), *args)
    assert buffer.raw[room:] == b"\xaa" * 64, "wrote behind its buffer"
    return length, buffer.value


CORNERS = [0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**32 - 1, 65]
NUMBERS = st.one_of(st.sampled_from(CORNERS), st.integers(-(2**63), 2**63 - 1))
WIDTHS = st.sampled_from(["", "0", "1", "7", "20", "100"])


def flags_of(letter, kernel):
    if kernel:
        return "-+ #0"
    return "-+ 0" if letter in "di" else "-0" if letter in "uxX" else "-"


def precisions_of(letter, flags, kernel):
    if kernel:
        return ["", "", ".", ".0", ".3", ".30", ".*"]
    return [""] if "0" in flags or letter == "c" else ["", ".3", ".30"]


@st.composite
def conversions(draw, kernel):
    """A conversion and its arguments.

    Without `kernel` only those where the kernel's rules and C's are the same.
    """
    letter = draw(st.sampled_from("diuxXcs" + ("op%nyL" if kernel else "")))
    flags = "".join(draw(st.lists(st.sampled_from(flags_of(letter, kernel)), max_size=3)))
    width = draw(WIDTHS)
    args = []
    precision = draw(st.sampled_from(precisions_of(letter, flags, kernel)))
    if kernel and draw(st.booleans()):
        width = "*"
        args.append(ctypes.c_int(draw(st.sampled_from([0, 1, -1, 9, -9, 40, 1 - 2**31]))))
    if precision == ".*":
        args.append(ctypes.c_int(draw(st.sampled_from([0, -1, 9, 40]))))
    qualifier = draw(st.sampled_from(["", "h", "l", "ll"])) if letter in "diouxX" else ""
    if letter == "s":
        args.append(ctypes.c_char_p(draw(st.sampled_from([b"", b"x", b"hello", b"z" * 90]))))
    elif letter == "n":
        args.append(ctypes.byref(ctypes.c_long()))
    elif letter == "c":
        args.append(ctypes.c_int(draw(st.integers(1, 255))))
    elif letter in "diouxXp":
        args.append(ctypes.c_int64(draw(NUMBERS)))
    if letter == "L":
        # A qualifier: it takes the next character for its conversion, were it the % of the next.
        letter = "Ly"
    return f"%{flags}{width}{precision}{qualifier}{letter}", args


def formats(kernel):
    text = st.sampled_from(["", "a", " b\n", "0x"])
    part = st.tuples(text, conversions(kernel)).map(lambda t: (t[0] + t[1][0], t[1][1]))
    parts = st.lists(part, min_size=1, max_size=4)
    return parts.map(
        lambda found: (
            "".join(text for text, _ in found),
            [arg for _, args in found for arg in args],
        )
    )


@settings(max_examples=500, deadline=None)
@given(formats(kernel=False))
def test_that_text_is_what_the_c_library_prints(ours, case):
    assert formatted(ours.guest_snprintf, *case) == formatted(ctypes.CDLL(None).snprintf, *case)


@pytest.mark.kernel
@settings(max_examples=500, deadline=None)
@given(formats(kernel=True), st.sampled_from([8, 40, 512]))
def test_that_text_is_what_the_kernels_guest_printf_prints(ours, kernels, case, room):
    aborted = ctypes.c_int.in_dll(ours, "aborted")
    aborted.value = 0
    theirs = formatted(kernels.checked, *case, room)
    mine = formatted(ours.guest_snprintf, *case, room)
    assert aborted.value == (theirs[0] < 0)
    assert theirs[0] < 0 or mine == theirs


@pytest.mark.parametrize(
    ("fmt", "arg", "text"),
    [  # where the kernel's rules are not C's
        ("%#x", 0, "0x0"),
        ("%#X", 0xAB, "0xAB"),
        ("%#o", 0, "00"),
        ("%.0d", 0, "0"),
        ("%08.3d", 5, "00000005"),
        ("%p", 0x1234, "0x00000000001234"),
        ("%20p", 0xAB, 18 * " " + "AB"),
        ("%zu", 5, "%zu"),
        ("%hhd", 5, "%hd"),
        ("%y", 5, "%y"),
        ("100%", 0, "100%"),
        ("%5%", 0, "%"),
        ("%lld", -5, "-5"),
        ("%hd", 0x18000, "-32768"),
        ("%hx", -1, "ffff"),
        ("%s", 0, "(null)"),
    ],
)
def test_that_the_kernels_own_rules_are_kept(ours, fmt, arg, text):
    assert formatted(ours.guest_snprintf, fmt, [ctypes.c_int64(arg)]) == (len(text), text.encode())
