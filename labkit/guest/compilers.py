"""The C compilers that can make guests: where they are, and the flags that each of them needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import InvalidState, NotAvailable

__all__ = [
    "ARCHES",
    "COMPILERS",
    "FAMILY_FLAGS",
    "FLAGS",
    "NO_FLOATS",
    "Compiler",
    "find_compiler",
]

COMPILERS = ("zig", "gcc", "clang", "cc")  # in the order they are tried

# What every compiler is told.
FLAGS = (
    "-std=gnu11",
    "-ffreestanding",
    "-fno-builtin",
    "-nostdlib",
    "-static",
    "-fno-pic",
    "-no-pie",
    "-fno-stack-protector",
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-gdwarf-4",
    "-Wall",
    "-Werror=implicit-function-declaration",
    "-Wl,-e,guest_code",
    "-Wl,-z,max-page-size=4096",
    "-Wl,--build-id=none",
)

# What one family is told beside that: to write call frame information into .debug_frame, for
# backtraces. The linker script drops .eh_frame, which would lie in guest memory.
FAMILY_FLAGS = {
    "zig": (
        "-fasynchronous-unwind-tables",
        "-fforce-dwarf-frame",
        "-fno-sanitize=all",
        "-Wl,--no-gc-sections",
        "-fdebug-compilation-dir=.",
    ),
    "clang": ("-fasynchronous-unwind-tables", "-fforce-dwarf-frame"),
    "gcc": ("-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns"),
}

# By (family, arch): the target, and code without floating point. ziglang accepts
# -mgeneral-regs-only and ignores it, so that there the CPU model has to leave the registers out.
NO_FLOATS = {
    ("zig", "x86_64"): (
        "-target",
        "x86_64-freestanding",
        "-mcpu=x86_64-sse-sse2-mmx-x87+soft_float",
        "-mno-red-zone",
    ),
    ("zig", "arm64"): ("-target", "aarch64-freestanding", "-mcpu=generic-neon-fp_armv8"),
    ("zig", "riscv64"): (
        "-target",
        "riscv64-freestanding",
        "-mcpu=generic_rv64+m+a+c+zicsr",
        "-mabi=lp64",
    ),
    ("zig", "s390x"): ("-target", "s390x-freestanding", "-mcpu=z13-vector+soft_float"),
    ("clang", "x86_64"): ("--target=x86_64-linux-gnu", "-mgeneral-regs-only", "-mno-red-zone"),
    ("gcc", "x86_64"): ("-m64", "-mgeneral-regs-only", "-mno-red-zone", "-fcf-protection=none"),
    ("gcc", "arm64"): ("-mgeneral-regs-only", "-mno-outline-atomics"),
    ("gcc", "riscv64"): ("-march=rv64imac_zicsr", "-mabi=lp64", "-mcmodel=medany"),
    ("gcc", "s390x"): ("-march=z13", "-msoft-float", "-mno-vx"),
}

# Architectures that guests can be compiled for: those that ziglang, which is always there, can do.
ARCHES = tuple(arch for family, arch in NO_FLOATS if family == "zig")

# Debian's names for cross compilers begin so.
CROSS = {
    "arm64": "aarch64-linux-gnu-",
    "riscv64": "riscv64-linux-gnu-",
    "s390x": "s390x-linux-gnu-",
}


@dataclass(frozen=True)
class Compiler:
    """A C compiler of this machine; family is the key of its flags."""

    name: str
    family: str
    command: tuple[str, ...]


def find_compiler(name: str | None = None, arch: str = "x86_64") -> Compiler:
    """The compiler of that name for an architecture, or the first there is.

    Names are "zig", "gcc", "clang" and "cc". Raises InvalidState for another one, and NotAvailable
    when this machine lacks it.
    """
    if name is not None and name not in COMPILERS:
        raise InvalidState(f"compiler {name!r} is not one of {', '.join(COMPILERS)}", compiler=name)

    candidates = COMPILERS if name is None else (name,)
    for candidate in candidates:
        found = _probe(candidate, CROSS.get(arch, ""))
        if found is not None and (found.family, arch) in NO_FLOATS:
            return found

    what = f"a C compiler for {arch}" if name is None else f"the compiler {name!r} for {arch}"
    raise NotAvailable(
        f"{what} is not on this machine; pip install ziglang brings one", compiler=name
    )


def _probe(name: str, prefix: str) -> Compiler | None:
    """The compiler of that name, for the architecture that a cross compiler's prefix says."""
    if name == "zig":
        return _probe_zig()

    path = shutil.which(prefix + name)
    if path is None:
        return None
    family = "clang" if name == "clang" else "gcc"
    return Compiler(name, family, (path,))


def _probe_zig() -> Compiler | None:
    """The program inside the ziglang package, which is one compiler for all architectures."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    program = "zig.exe" if os.name == "nt" else "zig"
    path = Path(spec.origin).resolve().parent / program
    if not path.is_file():
        return None
    return Compiler("zig", "zig", (str(path), "cc"))
