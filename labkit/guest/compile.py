"""Compiling guests: C in, a Program out, and the compiler's own words on error.

ziglang's clang does it by default, the machine's own gcc or clang when asked.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from labkit.errors import CompileError, InvalidState, NotAvailable
from labkit.guest.compilers import (
    ARCHES,
    FAMILY_FLAGS,
    FLAGS,
    NO_FLOATS,
    Compiler,
    find_compiler,
)
from labkit.guest.confine import confined
from labkit.guest.elf import read_elf
from labkit.guest.lines import LineTable
from labkit.guest.program import Program
from labkit.guest.sources import (
    LIBRARY,
    LIBRARY_NAME,
    MAX_SOURCE,
    SourceFiles,
    SourcePath,
    folders_of,
)

__all__ = ["compile_guest"]

TIMEOUT = 120  # seconds; ziglang's first run fills its cache
MAX_SOURCE_NAME = 200
SOURCE = ".source.c"
RESULT = "guest.elf"
ANY_BYTES = "surrogateescape"  # a source may have comments in Latin-1

# An attribute's name, where the kernel's headers have a macro.
NOINLINE = re.compile(r"__attribute__\s*\(\([^()]*\bnoinline\b")

# An include of something else than the library.
OWN_HEADER = re.compile(r'#\s*include\s*(?!\s*["<]labkit\.h[">])')

# A linker's warning, which is left out: a guest may name its functions as it likes.
ENTRY_MISSING = re.compile(r"^.*(cannot find entry symbol|entry symbol).*\n?", re.MULTILINE)

# A linker that misses one of the functions of lib/runtime, which most guests can do without.
RUNTIME_CALL = re.compile(
    r"undefined (symbol|reference)[^\n]*\b__(u?div|u?mod|u?divmod|mul|mulo|popcount|parity|clz|ctz"
    r"|ffs|clrsb|bswap|ashl|ashr|lshr|neg|u?cmp|addv|subv|mulv|negv|absv)[sdt]i[234]\b"
)

# (what a compiler says, one word of ours for the mistakes that everybody makes once)
HINTS = (
    (
        r"'__noinline__'",
        "a source with __attribute__((noinline)) cannot have the kernel's bare noinline too",
    ),
    (r"declar.*GUEST_|GUEST_.*declar", 'is #include "labkit.h" missing?'),
    (
        r"(Permission denied|AccessDenied|not permitted|incbin file|file not found: )",
        "a source's files lie below its own folder, or below those named with source_path=",
    ),
    (r"\b__[a-z]+[sdt]f[0-9]?\b|SSE (register|disabled|vector)", "guests have no floating point"),
)


def compile_guest(
    source_or_path: str | Path,
    arch: str = "x86_64",
    compiler: str | None = None,
    opt: str = "-O1",
    defines: Sequence[str] = (),
    name: str | None = None,
    source_path: SourcePath = (),
) -> Program:
    """Compile C text, or the file at a path, with the guest library into a Program.

    A Path is a file, and so is a str that ends in .c; any other str is the text itself. `defines`
    are "NAME" or "NAME=VALUE"; `name` is what messages and line numbers call the source
    ("guest.c"). Nothing but the source decides the result: no path of this machine gets into it.
    What it includes lies below its own folder (of text: the current one) or below those of
    `source_path`; other files of this machine are kept from the compiler (see confine.py).

    Raises CompileError with the compiler's own message, NotAvailable for an architecture or a
    compiler that is not here, InvalidState for a name that no source can have.
    """
    if arch not in ARCHES:
        known = ", ".join(ARCHES)
        raise NotAvailable(
            f"guests for {arch!r} cannot be compiled; there is a guest library for {known}",
            arch=arch,
        )

    text, path = _read_source(source_or_path)
    if not name:
        name = "guest.c" if path is None else str(source_or_path)
    _check_name(name)

    found = find_compiler(compiler, arch)
    folder = Path.cwd() if path is None else path.parent.resolve()
    folders = (folder, *folders_of(source_path))
    options = [opt, *(f"-D{define}" for define in defines), *(f"-iquote{each}" for each in folders)]
    with tempfile.TemporaryDirectory(prefix="labkit-") as work:
        _write_source(Path(work), name, text)
        command = _command(found, arch, Path(work), options)
        image, output = _linked(found, command, Path(work), folders)

    shown = text.encode("utf-8", ANY_BYTES).decode("utf-8", "replace")
    sources = {name: shown}
    if OWN_HEADER.search(text):
        sources = _included(image, folders) | sources
    return Program(image, Path(name).stem, None, sources, output)


def _included(image: bytes, folders: Sequence[Path]) -> dict[str, str]:
    """The text of the other files that the code came from, as it is now."""
    files = SourceFiles({}, None, folders)
    found = {}
    for file in LineTable.read(image, read_elf(image, "guest").segments).files:
        lines = None if file.startswith(LIBRARY_NAME) else files.lines(file)
        if lines is not None:
            found[file] = "\n".join(lines)
    return found


def _read_source(source_or_path: str | Path) -> tuple[str, Path | None]:
    """The C text, and the file that it came from."""
    try:
        if isinstance(source_or_path, str) and _is_text(source_or_path):
            source_or_path.encode("utf-8", ANY_BYTES)  # or it could not be written for the compiler
            return source_or_path, None
        path = Path(source_or_path)
        return _read_file(path).decode("utf-8", ANY_BYTES), path
    except (OSError, ValueError) as error:
        raise CompileError(f"the source cannot be read: {error}", command=(), output="") from error


def _read_file(path: Path) -> bytes:
    """The bytes of a C file; raises OSError or ValueError for what is none."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_SOURCE + 1)
    if len(data) > MAX_SOURCE:
        raise ValueError(f"{path} is larger than {MAX_SOURCE >> 20} MiB")
    return data


def _is_text(source_or_path: str) -> bool:
    return "\n" in source_or_path or not source_or_path.endswith(".c")


def _check_name(name: str) -> None:
    """Raise InvalidState for a name that no source can have."""
    if not name.isprintable() or len(name) > MAX_SOURCE_NAME or Path(name).name in ("", ".."):
        raise InvalidState(f"{name!r} cannot be the name of a source", name=name)

    if name in _library_headers():
        raise InvalidState(
            f"{name!r} cannot be the name of a source: the guest library has a header of that "
            "name, and whoever includes it would get the source",
            name=name,
        )


def _library_headers() -> set[str]:
    """What guests include: labkit.h, and the kernel's names for it."""
    headers = [*LIBRARY.glob("*.h"), *(LIBRARY / "compat").glob("*.h")]
    return {header.name for header in headers}


def _write_source(work: Path, name: str, text: str) -> None:
    """Write the source into the compiler's folder, so that its errors are the user's lines."""
    if Path(name).name == name:  # gcc quotes the line from the file that #line names
        (work / name).write_bytes(text.encode("utf-8", ANY_BYTES))

    before = ""
    if NOINLINE.search(text):
        before = "#define LABKIT_NOINLINE_IS_AN_ATTRIBUTE\n"
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    whole = f'{before}#line 1 "{quoted}"\n{text}\n'
    (work / SOURCE).write_bytes(whole.encode("utf-8", ANY_BYTES))


def _command(compiler: Compiler, arch: str, work: Path, options: Sequence[str]) -> list[str]:
    """The whole command line: the guest and the library in one go."""
    return [
        *compiler.command,
        *FLAGS,
        *FAMILY_FLAGS[compiler.family],
        *NO_FLOATS[compiler.family, arch],
        *options,
        *_prefix_maps(compiler, work),
        f"-I{LIBRARY}",
        f"-I{LIBRARY / 'compat'}",
        "-T",
        str(LIBRARY / "link.ld"),
        "-o",
        RESULT,
        SOURCE,
        *_library_sources(arch),
    ]


def _prefix_maps(compiler: Compiler, work: Path) -> list[str]:
    """Options that give every directory a name that is the same anywhere."""
    names = {LIBRARY: LIBRARY_NAME.rstrip("/"), Path(compiler.command[0]).parent: "compiler"}
    # Not for zig: its cache would never match a command line that differs every time.
    if compiler.family != "zig":
        names[work] = "."
    return [f"-ffile-prefix-map={there}={shown}" for there, shown in names.items()]


def _library_sources(arch: str) -> list[str]:
    """The files of the guest library: what all architectures share, and this one's own."""
    files = [*LIBRARY.iterdir(), *(LIBRARY / arch).iterdir()]
    return sorted(str(file) for file in files if file.suffix in (".c", ".S"))


def _linked(
    compiler: Compiler, command: list[str], work: Path, folders: Sequence[Path]
) -> tuple[bytes, str]:
    """The same as _run, with the compiler's runtime functions where the guest calls any."""
    try:
        return _run(compiler, command, work, folders)
    except CompileError as error:
        if not RUNTIME_CALL.search(str(error.facts.get("output", ""))):
            raise
    return _run(compiler, [*command, *_runtime_sources()], work, folders)


def _runtime_sources() -> list[str]:
    """What compilers call for operations that a processor lacks."""
    return sorted(str(file) for file in (LIBRARY / "runtime").glob("*.c"))


def _run(
    compiler: Compiler, command: list[str], work: Path, folders: Sequence[Path]
) -> tuple[bytes, str]:
    """The ELF file's bytes and what the compiler had to say; raises CompileError."""
    environment = _environment(work)
    call = partial(
        subprocess.run,
        command,
        cwd=work,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT,
        env=environment,
    )
    read = (*folders, LIBRARY, Path(compiler.command[0]).resolve().parent)
    try:
        done = confined(call, read, (work, *_caches(environment)))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CompileError(
            f"{compiler.name} could not run: {error}", command=tuple(command), output=""
        ) from error

    output = ENTRY_MISSING.sub("", done.stderr.replace(f"{work}/", "")).strip()
    result = work / RESULT
    if done.returncode != 0 or not result.is_file():
        said = output or f"{compiler.name} ended with status {done.returncode}"
        raise CompileError(said + _hint(output), command=tuple(command), output=output)
    return result.read_bytes(), output


def _environment(work: Path) -> dict[str, str]:
    """English messages, a folder for what is left half done, and a cache for zig.

    Zig insists on one; where there is no home it is the work folder's.
    """
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(work)}
    if not os.access(Path.home(), os.W_OK):
        environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(work / "cache"))
    return environment


def _caches(environment: dict[str, str]) -> list[Path]:
    """The folders in which zig keeps what it has compiled, made if need be."""
    usual = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folders = [Path(environment.get("ZIG_GLOBAL_CACHE_DIR") or Path(usual) / "zig")]
    if "ZIG_LOCAL_CACHE_DIR" in environment:
        folders.append(Path(environment["ZIG_LOCAL_CACHE_DIR"]))
    for folder in folders:
        with suppress(OSError):  # zig says it better
            folder.mkdir(parents=True, exist_ok=True)
    return folders


def _hint(output: str) -> str:
    """Our word for one of the mistakes in HINTS, as a line of its own."""
    for pattern, hint in HINTS:
        if re.search(pattern, output):
            return f"\n({hint})"
    return ""
