"""Who imports whom: rooms, the homes of third-party names; where an architecture may be named."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from modules import MODULES, Module, Rule, broken, check, example

# Lowest first; a room imports from lower lines only, neighbours on a line not from each other.
ROOMS = (
    ("outside",),
    ("words",),
    ("bits", "errors"),
    ("checked", "hexed"),
    ("shown",),
    ("arch",),
    ("paging", "engines"),
    ("machine",),
    ("guest",),
    ("ucall", "sev"),
    ("session",),
    ("look", "explore"),
    ("hosts", "views"),
    ("lab",),
    ("magics", "bench"),
    ("cli",),
    ("",),  # "" is labkit/__init__.py: the public names
)
USERS = {"magics", "bench", "cli"}  # these may use the public names too
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Where each third-party name lives (a path prefix below labkit/).
HOMES = {
    "unicorn": ("engines/unicorn",),
    "fcntl": ("engines/kvm",),
    "anywidget": ("views",),
    "ipywidgets": ("views",),
    "traitlets": ("views",),
    "matplotlib": ("views",),
    "IPython": ("views", "magics"),
    "elftools": ("guest",),
    "ziglang": ("guest",),
    "capstone": ("engines",),
    "numba": ("engines/unicorn",),
    "cryptography": ("sev", "bench"),
    "argcomplete": ("cli",),
    "PIL": ("views",),
    "resvg_py": ("views",),
    "tqdm": ("session/progress",),
    "pandas": ("hexed", "paging", "ucall", "session", "look", "explore"),
    "numpy": (
        "paging",
        "engines",
        "machine",
        "guest",
        "ucall",
        "sev",
        "session",
        "look",
        "explore",
        "views",
        "lab",
        "bench",
    ),
    "jupyter_core": ("cli",),
    "nbclient": ("cli",),
    "nbformat": ("cli",),
}
# These load only when first needed.
LAZY = {
    "tqdm",
    "argcomplete",
    "pandas",
    "matplotlib",
    "numba",
    "cryptography",
    "ziglang",
    "anywidget",
    "ipywidgets",
    "IPython",
    "nbclient",
    "nbformat",
}
# Rooms that are themselves loaded only when first needed
LAZY_EXEMPT = {"hexed", "views", "magics"}

ARCH_NAMES = {"x86_64", "x86", "arm64", "aarch64", "riscv", "riscv64", "s390", "s390x"}


def arrows_up(module: Module) -> Iterator[str]:
    """Imports of a higher room, of a neighbour, or of no room at all."""
    if module.room not in LEVEL:
        yield f"{module.rel} is in no room of DESIGN.md"
        return
    for name, line, _ in module.imports:
        top, _, rest = name.partition(".")
        if not top:
            yield f"{module.rel}:{line} imports {name}: imports are absolute"
        elif top == "labkit" and not _may_import(module.room, rest.partition(".")[0]):
            yield f"{module.rel}:{line} imports {name}"


def _may_import(room: str, target: str) -> bool:
    """Whether a room may import another."""
    if target not in LEVEL:
        return False
    if target == "":
        return room in USERS
    return target == room or LEVEL[target] < LEVEL[room]


def strangers(module: Module) -> Iterator[str]:
    """Third-party names away from home, or loaded with labkit where they should wait."""
    for name, line, eager in module.imports:
        top = name.partition(".")[0]
        where = f"{module.rel}:{line} imports {name}"
        if top in HOMES and not any(_inside(module.rel, home) for home in HOMES[top]):
            yield f"{where}; its home is {HOMES[top]}"
        if top in LAZY and eager and module.room not in LAZY_EXEMPT:
            yield f"{where} when labkit is imported; it loads when first needed"


def _inside(rel: str, home: str) -> bool:
    return rel == f"{home}.py" or rel.startswith(f"{home}/")


def architectures_asked_for(module: Module) -> Iterator[str]:
    """Comparisons with an architecture's name outside arch/ and the engines."""
    if module.room in ("arch", "engines"):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        leaves = [leaf for side in sides for leaf in ast.walk(side)]
        literals = {leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)}
        if literals & ARCH_NAMES:
            yield f"{module.rel}:{node.lineno}: {ast.unparse(node)}: put it into arch/ as data"


def test_that_the_package_is_found() -> None:
    found = {module.rel for module in MODULES}
    assert {"bits.py", "errors.py", "arch/x86.py", "cli/doctor.py"} <= found


def test_that_every_directory_with_code_is_a_package() -> None:
    bare = {module.rel for module in MODULES if not (module.path.parent / "__init__.py").exists()}
    assert not bare, f"no __init__.py beside {sorted(bare)}"


def test_that_every_arrow_points_down() -> None:
    check(arrows_up)


def test_that_third_party_names_stay_at_home() -> None:
    check(strangers)


def test_that_nobody_asks_for_the_architecture_by_name() -> None:
    check(architectures_asked_for)


@pytest.mark.parametrize(
    ("rule", "rel", "source"),
    [
        (arrows_up, "arch/x86.py", "def f():\n    from labkit.paging import walk"),
        (arrows_up, "paging/walk.py", "import labkit.engines.base"),
        (arrows_up, "ucall/pool.py", "from labkit import lab"),
        (arrows_up, "views/pool.py", "import labkit"),
        (arrows_up, "views/pool.py", "from . import svg"),
        (arrows_up, "utils.py", "import os"),
        (strangers, "lab.py", "def f():\n    import unicorn"),
        (strangers, "paging/scan.py", "import pandas as pd"),
        (architectures_asked_for, "lab.py", "if vm.arch == 'x86_64': pass"),
        (architectures_asked_for, "lab.py", "x = 1 if arch in ('arm64', 'riscv') else 2"),
        (architectures_asked_for, "lab.py", "match arch:\n    case 'arm64': pass"),
    ],
)
def test_that_a_rule_can_be_broken(rule: Rule, rel: str, source: str) -> None:
    assert broken(rule, (example(rel, source),))
