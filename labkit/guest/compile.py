"""Compiling guests: ziglang's clang by default, the machine's own gcc or clang when asked; the compiler's own words on error."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import CompileError, InvalidState, NotAvailable
from labkit.guest.lines import LIBRARY, LIBRARY_NAME
from labkit.guest.program import Program

__all__ = [
    "COMPILERS",
    "Compiler",
    "build_prebuilt",
    "compile_guest",
    "find_compiler",
    "prebuilt_defines",
]

COMPILERS = ("zig", "gcc", "clang", "cc")  # in the order they are tried
TIMEOUT = 120  # seconds; ziglang's first run fills its cache
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
FAMILIES = {
    "zig": (
        "-fasynchronous-unwind-tables",
        "-fforce-dwarf-frame",
        "-fno-sanitize=all",
        "-Wl,--no-gc-sections",
        "-fdebug-compilation-dir=.",
    ),
    "clang": (),
    "gcc": ("-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns"),
}
NO_FLOATS = {  # (family, arch); ziglang accepts -mgeneral-regs-only and ignores it
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
CROSS = {
    "arm64": "aarch64-linux-gnu-",
    "riscv64": "riscv64-linux-gnu-",
    "s390x": "s390x-linux-gnu-",
}  # Debian's prefixes
DEFAULT_ARCH, EVERYWHERE = (
    "x86_64",
    ("hello", "two_vcpus"),
)  # guests that come prebuilt for all architectures
ARCHES = tuple(arch for family, arch in NO_FLOATS if family == "zig")
ANY_BYTES = "surrogateescape"  # a source may have comments in Latin-1
NOINLINE = re.compile(
    r"__attribute__\s*\(\([^()]*\bnoinline\b"
)  # an attribute's name, where the kernel's headers have a macro
HINTS = (
    (
        r"'__noinline__'",
        "a source with __attribute__((noinline)) cannot have the kernel's bare noinline too",
    ),
    (r"declar.*GUEST_|GUEST_.*declar", 'is #include "labkit.h" missing?'),
    (r"\b__[a-z]+[sdt]f[0-9]?\b|SSE (register|disabled|vector)", "guests have no floating point"),
)
ENTRY_MISSING = re.compile(  # a guest may name its functions as it likes
    r"^.*(cannot find entry symbol|entry symbol).*\n?", re.MULTILINE
)


@dataclass(frozen=True)
class Compiler:
    """A C compiler of this machine; family is the key of its flags."""

    name: str
    family: str
    command: tuple[str, ...]


def find_compiler(name: str | None = None, arch: str = "x86_64") -> Compiler:
    """The compiler of that name ("zig", "gcc", "clang", "cc") for an architecture, or the first there is; raises NotAvailable."""
    if name is not None and name not in COMPILERS:
        raise InvalidState(f"compiler {name!r} is not one of {', '.join(COMPILERS)}", compiler=name)
    for candidate in (name,) if name else COMPILERS:
        if (found := _probe(candidate, CROSS.get(arch, ""))) and (found.family, arch) in NO_FLOATS:
            return found
    what = f"the compiler {name!r} for {arch}" if name else f"a C compiler for {arch}"
    raise NotAvailable(
        f"{what} is not on this machine; pip install ziglang brings one", compiler=name
    )


def _probe(name: str, prefix: str) -> Compiler | None:
    if name == "zig":
        spec = importlib.util.find_spec("ziglang")
        path = (
            Path(spec.origin).resolve().parent / ("zig.exe" if os.name == "nt" else "zig")
            if spec and spec.origin
            else None
        )
        return Compiler(name, name, (str(path), "cc")) if path and path.is_file() else None
    found = shutil.which(prefix + name)
    return Compiler(name, "clang" if name == "clang" else "gcc", (found,)) if found else None


def compile_guest(
    source_or_path: str | Path,
    arch: str = "x86_64",
    compiler: str | None = None,
    opt: str = "-O1",
    defines: Sequence[str] = (),
    name: str | None = None,
) -> Program:
    """Compile C text, or the file at a Path (or a str that ends in .c), with the guest library into a Program.

    `defines` are "NAME" or "NAME=VALUE"; `name` is what messages and line numbers call the source ("guest.c"). Nothing but the
    source decides the result: no path of this machine gets into it. Raises CompileError with the compiler's own message.
    """
    if arch not in ARCHES:
        raise NotAvailable(
            f"guests for {arch!r} cannot be compiled; there is a guest library for {', '.join(ARCHES)}",
            arch=arch,
        )
    text, path = _source(source_or_path)
    name = name or (str(source_or_path) if path else "guest.c")
    if not name.isprintable() or len(name) > 200 or Path(name).name in ("", ".."):
        raise InvalidState(f"{name!r} cannot be the name of a source", name=name)
    found = find_compiler(compiler, arch)
    with tempfile.TemporaryDirectory(prefix="labkit-") as work:
        source, line = Path(work) / ".source.c", name.replace("\\", "\\\\").replace('"', '\\"')
        if Path(name).name == name:  # gcc quotes the line from the file that #line names
            (Path(work) / name).write_bytes(text.encode("utf-8", ANY_BYTES))
        first = "#define LABKIT_NOINLINE_IS_AN_ATTRIBUTE\n" if NOINLINE.search(text) else ""
        source.write_bytes(f'{first}#line 1 "{line}"\n{text}\n'.encode("utf-8", ANY_BYTES))
        flags = (
            opt,
            *(f"-D{define}" for define in defines),
            f"-iquote{path.parent.resolve() if path else Path.cwd()}",
        )
        image, output = _run(found, _command(found, arch, source, flags), Path(work))
    shown = text.encode("utf-8", ANY_BYTES).decode("utf-8", "replace")
    return Program(image, Path(name).stem, None, {name: shown}, output)


def _source(source_or_path: str | Path) -> tuple[str, Path | None]:
    try:
        if isinstance(source_or_path, str) and (
            "\n" in source_or_path or not source_or_path.endswith(".c")
        ):
            source_or_path.encode("utf-8", ANY_BYTES)
            return source_or_path, None
        return Path(source_or_path).read_bytes().decode("utf-8", ANY_BYTES), Path(source_or_path)
    except (OSError, ValueError) as error:
        raise CompileError(f"the source cannot be read: {error}", command=(), output="") from error


def _command(compiler: Compiler, arch: str, source: Path, flags: Sequence[str]) -> list[str]:
    """The whole command line: the guest and the library in one go, every directory mapped to a name that is the same anywhere."""
    library = sorted(
        str(p)
        for folder in (LIBRARY, LIBRARY / arch)
        for p in folder.iterdir()
        if p.suffix in (".c", ".S")
    )
    places = {LIBRARY: LIBRARY_NAME.rstrip("/"), Path(compiler.command[0]).parent: "compiler"}
    if (
        compiler.family != "zig"
    ):  # its cache would never match a command line that differs every time
        places[source.parent] = "."
    maps = [f"-ffile-prefix-map={there}={shown}" for there, shown in places.items()]
    return [
        *compiler.command,
        *FLAGS,
        *FAMILIES[compiler.family],
        *NO_FLOATS[compiler.family, arch],
        *flags,
        *maps,
        f"-I{LIBRARY}",
        f"-I{LIBRARY / 'compat'}",
        "-T",
        str(LIBRARY / "link.ld"),
        "-o",
        "guest.elf",
        source.name,
        *library,
    ]


def _run(compiler: Compiler, command: list[str], work: Path) -> tuple[bytes, str]:
    """The ELF file's bytes and what the compiler had to say."""
    env = {**os.environ, "LC_ALL": "C"}
    if not os.access(Path.home(), os.W_OK):  # zig insists on a cache
        env.setdefault("ZIG_GLOBAL_CACHE_DIR", str(work / "cache"))
    try:
        done = subprocess.run(
            command,
            cwd=work,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT,
            env=env,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CompileError(
            f"{compiler.name} could not run: {error}", command=tuple(command), output=""
        ) from error
    output, result = (
        ENTRY_MISSING.sub("", done.stderr.replace(f"{work}/", "")).strip(),
        work / "guest.elf",
    )
    if done.returncode or not result.is_file():
        raise CompileError(
            (output or f"{compiler.name} ended with status {done.returncode}") + _hint(output),
            command=tuple(command),
            output=output,
        )
    return result.read_bytes(), output


def _hint(output: str) -> str:
    """One word of ours for the mistakes that everybody makes once."""
    return next((f"\n({hint})" for pattern, hint in HINTS if re.search(pattern, output)), "")


def prebuilt_defines(source: Path) -> tuple[str, ...]:
    """What a prebuilt guest is compiled with: the words -DNAME in the comment that is its first line."""
    return tuple(re.findall(r"-D(\w+)", source.read_text().partition("\n")[0]))


def build_prebuilt(folder: Path) -> list[Path]:
    """Compile every .c of a folder to the .elf beside it, and some for each other architecture into a folder of its name.

    Always with ziglang, so that everybody gets the same bytes.
    """
    built = []
    for source, arch in [
        (source, arch) for arch in ARCHES for source in sorted(folder.glob("*.c"))
    ]:
        if arch == DEFAULT_ARCH or source.stem in EVERYWHERE:
            target = (folder / ("" if arch == DEFAULT_ARCH else arch) / source.name).with_suffix(
                ".elf"
            )
            target.parent.mkdir(exist_ok=True)
            fresh = target.with_suffix(".new")
            fresh.write_bytes(
                compile_guest(
                    source, arch, "zig", defines=prebuilt_defines(source), name=source.name
                ).image
            )
            fresh.replace(target)
            built.append(target)
    return built


if __name__ == "__main__":
    for path in build_prebuilt(Path(sys.argv[1] if len(sys.argv) > 1 else "data/guests")):
        print(path, path.stat().st_size)
