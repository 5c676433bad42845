"""Builds the machine code in engines/unicorn/native from its C sources (`make native`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOM = Path(__file__).parents[1] / "labkit" / "engines" / "unicorn" / "native"
TARGETS = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}
FLAGS = [
    "-c",
    "-ffreestanding",
    "-fomit-frame-pointer",
    "-ffunction-sections",
    "-fno-stack-protector",
    "-fPIC",
    "-fno-asynchronous-unwind-tables",
    "-fno-sanitize=all",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fno-jump-tables",
]


@dataclass(frozen=True)
class Source:
    """One C file: functions that each stand alone, or one that begins the whole text."""

    name: str
    functions: tuple[str, ...]
    optimize: str

    @property
    def path(self) -> Path:
        """The C file."""
        return ROOM / f"{self.name}.c"

    @property
    def sha256(self) -> str:
        """What its code was made from."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def build(self, machine: str) -> dict[str, bytes]:
        """The code of each function for one kind of host, with nothing left to relocate."""
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "code.o"
            command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[machine], *FLAGS]
            subprocess.run([*command, self.optimize, "-o", out, self.path], check=True)
            elf = ELFFile(io.BytesIO(out.read_bytes()))
        code = {}
        for function in self.functions:
            section = f".text.{function}"
            assert elf.get_section_by_name(f".rela{section}") is None, "the code must stand alone"
            code[function] = bytes(elf.get_section_by_name(section).data())
        return code

    def text(self) -> str:
        """The Python file that holds the code."""
        lines = [
            f'"""Machine code of {self.name}.c, made by tests/build_native.py; '
            'a test sees that they belong together."""',
            "",
            '__all__ = ["COMPILER", "MACHINE_CODE", "SOURCE_SHA256"]',
            "",
            f'COMPILER = "{compiler()}"',
            f'SOURCE_SHA256 = "{self.sha256}"',
            "MACHINE_CODE = {  # (function, host): code in hexadecimal",
        ]
        for machine in TARGETS:
            for function, code in self.build(machine).items():
                lines.append(f'    ("{function}", "{machine}"): (')
                lines += [f'        "{part}"' for part in textwrap.wrap(code.hex(), 88)]
                lines.append("    ),")
        return "\n".join([*lines, "}", ""])


# `fill` takes its callees into itself: they are static, and each has one caller
SOURCES = (
    Source("mmu", ("fill",), "-Os"),
    Source("stubs", ("tally", "locked", "rep", "check"), "-O2"),
)


def compiler() -> str:
    """The compiler that is installed, by name and version."""
    return f"ziglang {importlib.metadata.version('ziglang')}"


def main() -> None:
    """Write the file of code beside each source."""
    for source in SOURCES:
        (ROOM / f"{source.name}_code.py").write_text(source.text())


if __name__ == "__main__":
    main()
