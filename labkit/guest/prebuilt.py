"""Guests that come compiled, for machines on which nobody wants to wait: how they are made.

`python -m labkit.guest.prebuilt FOLDER` makes them anew (without an argument: data/guests).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from labkit.guest.compile import compile_guest
from labkit.guest.compilers import ARCHES

__all__ = ["build_prebuilt", "prebuilt_defines"]

DEFAULT_ARCH = "x86_64"
EVERYWHERE = ("hello", "two_vcpus")  # guests that come prebuilt for all architectures


def prebuilt_defines(source: Path) -> tuple[str, ...]:
    """What a prebuilt guest is compiled with: the words -DNAME in the comment that begins it."""
    first_line = source.read_text().partition("\n")[0]
    return tuple(re.findall(r"-D(\w+)", first_line))


def build_prebuilt(folder: Path) -> list[Path]:
    """Compile every .c of a folder to the .elf beside it, and return what was built.

    Some are compiled for each other architecture too, into a folder of its name. Always with
    ziglang, so that everybody gets the same bytes.
    """
    built = []
    sources = sorted(folder.glob("*.c"))
    for arch in ARCHES:
        for source in sources:
            if arch == DEFAULT_ARCH:
                built.append(_build(source, arch, folder))
            elif source.stem in EVERYWHERE:
                built.append(_build(source, arch, folder / arch))
    return built


def _build(source: Path, arch: str, folder: Path) -> Path:
    """Compile one source; its ELF is replaced in one go, so nobody meets half of it."""
    defines = prebuilt_defines(source)
    program = compile_guest(source, arch, "zig", defines=defines, name=source.name)
    folder.mkdir(exist_ok=True)
    fresh = folder / f"{source.stem}.new"
    fresh.write_bytes(program.image)
    return fresh.replace(folder / f"{source.stem}.elf")


if __name__ == "__main__":
    for path in build_prebuilt(Path(sys.argv[1] if len(sys.argv) > 1 else "data/guests")):
        print(path, path.stat().st_size)
