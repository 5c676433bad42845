"""Builds labkit/engines/unicorn/native/mmu_code.py from mmu.c: machine code for the hosts that labkit runs on (`make mmu`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOM = Path(__file__).parents[1] / "labkit" / "engines" / "unicorn" / "native"
TARGETS = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}
FLAGS = [
    "-Os",
    "-c",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fPIC",
    "-fno-asynchronous-unwind-tables",
    "-fno-sanitize=all",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fno-jump-tables",
]


def build(source: Path, target: str) -> bytes:
    """The code of mmu.c, with `fill` at its start and nothing left to relocate."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "mmu.o"
        subprocess.run(
            [sys.executable, "-m", "ziglang", "cc", "-target", target, *FLAGS, "-o", out, source],
            check=True,
        )
        elf = ELFFile(io.BytesIO(out.read_bytes()))
    text, symbols = elf.get_section_by_name(".text"), elf.get_section_by_name(".symtab")
    assert elf.get_section_by_name(".rela.text") is None, "the code must stand alone"
    assert symbols.get_symbol_by_name("fill")[0]["st_value"] == 0, "fill must come first"
    return bytes(text.data())


def main() -> None:
    """Write mmu_code.py."""
    source = ROOM / "mmu.c"
    parts = [
        '"""Machine code of mmu.c, made by tests/build_mmu.py; tests/test_mmu_code.py sees to it that the two belong together."""\n',
        '__all__ = ["COMPILER", "MACHINE_CODE", "SOURCE_SHA256"]\n',
        f'COMPILER = "ziglang {importlib.metadata.version("ziglang")}"',
        f'SOURCE_SHA256 = "{hashlib.sha256(source.read_bytes()).hexdigest()}"',
        "MACHINE_CODE = {",
    ]
    for machine, target in TARGETS.items():
        lines = textwrap.wrap(build(source, target).hex(), 128)
        parts.append(
            f'    "{machine}": (\n' + "\n".join(f'        "{line}"' for line in lines) + "),"
        )
    (ROOM / "mmu_code.py").write_text("\n".join([*parts, "}"]) + "\n")


if __name__ == "__main__":
    main()
