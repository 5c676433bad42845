"""The rules of the house, checked on the source text: who imports whom, sizes, names, what is public."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from paths import REPO

PACKAGE = REPO / "labkit"

# Lowest first; a room imports from lower lines only, and neighbours on a line do not import each other.
ROOMS = (
    ("bits", "errors", "shown"),
    ("arch",),
    ("paging", "engines"),
    ("machine",),
    ("guest",),
    ("ucall", "sev"),
    ("session",),
    ("look", "explore"),
    ("hosts", "views"),
    ("lab",),
    ("magics", "cli", "bench"),
    ("",),  # "" is labkit/__init__.py: the public names
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Where each third-party name lives (a path prefix below labkit/). Those in LAZY also load only when first needed.
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
    "pandas": ("paging", "ucall", "session", "look", "explore"),
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
LAZY = {
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
LAZY_EXEMPT = {"views", "magics"}  # rooms that are themselves loaded only when first needed

MAX_FILE, MAX_FUNCTION = 500, 50  # formatted lines
ARCH_NAMES = {"x86_64", "x86", "arm64", "aarch64", "riscv", "riscv64", "s390", "s390x"}
BAD_NAMES = {"addr", "ptr", "vaddr", "paddr"}
BAD_CLASS = re.compile(r"(Manager|Helper|Utils?|Base)$|_impl$")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    path: Path

    @property
    def rel(self) -> str:
        """Path below labkit/."""
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def room(self) -> str:
        """The room it belongs to."""
        first = self.rel.partition("/")[0].removesuffix(".py")
        return "" if first == "__init__" else first

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.path.read_text())

    @cached_property
    def imports(self) -> tuple[tuple[str, int, bool], ...]:
        """(dotted name, line, at module level and outside TYPE_CHECKING) of everything imported."""
        eager = set(_eager(self.tree.body))
        return tuple(
            (name, node.lineno, node in eager)
            for node in ast.walk(self.tree)
            for name in self._names(node)
        )

    def _names(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{self.rel}:{node.lineno}: imports are absolute"
            assert node.module
            if node.module == "labkit":
                yield from (f"labkit.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _eager(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _eager(getattr(node, part, []))


MODULES = tuple(Module(path) for path in sorted(PACKAGE.rglob("*.py")))
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.rel)


def test_that_the_package_is_found() -> None:
    assert {"bits.py", "errors.py", "arch/x86.py", "cli/doctor.py"} <= {
        module.rel for module in MODULES
    }


@each_module
def test_that_every_arrow_points_down(module: Module) -> None:
    assert module.room in LEVEL, f"{module.rel} is in no room of DESIGN.md"
    for name, line, _ in module.imports:
        top, _, rest = name.partition(".")
        if top != "labkit":
            continue
        target = rest.partition(".")[0]
        where = f"{module.rel}:{line} imports {name}"
        assert target in LEVEL, where
        if target != module.room:
            assert LEVEL[target] < LEVEL[module.room] or (
                target == "" and module.room in ROOMS[-2]
            ), where


@each_module
def test_that_third_party_names_stay_at_home(module: Module) -> None:
    for name, line, eager in module.imports:
        top = name.partition(".")[0]
        where = f"{module.rel}:{line} imports {name}"
        if top in HOMES:
            assert any(_inside(module.rel, home) for home in HOMES[top]), (
                f"{where}; its home is {HOMES[top]}"
            )
        if top in LAZY and module.room not in LAZY_EXEMPT:
            assert not eager, f"{where} when labkit is imported; it loads when first needed"


def _inside(rel: str, home: str) -> bool:
    return rel == f"{home}.py" or rel.startswith(f"{home}/")


@each_module
def test_that_nobody_asks_for_the_architecture_by_name(module: Module) -> None:
    if module.room in ("arch", "engines"):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        literals = {
            leaf.value
            for side in sides
            for leaf in ast.walk(side)
            if isinstance(leaf, ast.Constant)
        }
        assert not literals & ARCH_NAMES, (
            f"{module.rel}:{node.lineno}: {ast.unparse(node)}: put it into arch/ as data"
        )


@each_module
def test_that_files_and_functions_are_short(module: Module) -> None:
    lines = module.path.read_text().count("\n")
    assert lines <= MAX_FILE, f"{module.rel} has {lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, (
                f"{module.rel}:{node.lineno} {node.name} has {length} lines"
            )


@each_module
def test_that_what_is_public_is_listed_and_says_what_it_is(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.rel} has no docstring"
    listed, defined = _listed(module.tree), _defined(module.tree)
    if module.path.name == "__init__.py" and listed is None:
        assert not defined, f"{module.rel} defines {defined} without __all__"
        return
    assert listed is not None, f"{module.rel} has no __all__"
    unlisted = sorted(name for name in defined if not name.startswith("_") and name not in listed)
    assert not unlisted, f"{module.rel}: {unlisted} are neither in __all__ nor private"
    for name in sorted(listed & set(defined)):
        for where, node in _public(name, defined[name]):
            assert ast.get_docstring(node), f"{module.rel}:{node.lineno} {where} has no docstring"


def _listed(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))  # type: ignore[union-attr, arg-type]
    return None


def _defined(tree: ast.Module) -> dict[str, Function | ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, Function | ast.ClassDef)}


def _public(
    name: str, node: Function | ast.ClassDef
) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """The thing itself, and of a class its public methods (a property's setter and a Protocol's line say nothing new)."""
    yield name, node
    if not isinstance(node, ast.ClassDef) or any(
        ast.unparse(base).startswith("Protocol") for base in node.bases
    ):
        return
    for child in node.body:
        if isinstance(child, Function) and not child.name.startswith("_") and not _is_setter(child):
            yield f"{name}.{child.name}", child


def _is_setter(node: Function) -> bool:
    return any(
        isinstance(d, ast.Attribute) and d.attr in ("setter", "deleter")
        for d in node.decorator_list
    )


@each_module
def test_that_names_say_which_address_space(module: Module) -> None:
    for node in ast.walk(module.tree):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                assert name not in BAD_NAMES, (
                    f"{module.rel}:{node.lineno}: {name}; say gva, gpa, hva or hpa"
                )
            case ast.ClassDef(name=name):
                assert not BAD_CLASS.search(name), (
                    f"{module.rel}:{node.lineno}: class {name}; a class is a noun from a manual"
                )


def test_that_every_directory_with_code_is_a_package() -> None:
    bare = {module.rel for module in MODULES if not (module.path.parent / "__init__.py").exists()}
    assert not bare, f"no __init__.py beside {sorted(bare)}"


@pytest.mark.parametrize(
    ("rule", "rel", "source"),
    [
        (
            test_that_every_arrow_points_down,
            "arch/x86.py",
            "def f():\n    from labkit.paging import walk",
        ),
        (test_that_every_arrow_points_down, "paging/walk.py", "import labkit.engines.base"),
        (test_that_every_arrow_points_down, "ucall/pool.py", "from labkit import lab"),
        (test_that_every_arrow_points_down, "views/pool.py", "import labkit"),
        (test_that_every_arrow_points_down, "utils.py", "import os"),
        (test_that_third_party_names_stay_at_home, "lab.py", "def f():\n    import unicorn"),
        (test_that_third_party_names_stay_at_home, "paging/scan.py", "import pandas as pd"),
        (
            test_that_nobody_asks_for_the_architecture_by_name,
            "lab.py",
            "if vm.arch == 'x86_64': pass",
        ),
        (
            test_that_nobody_asks_for_the_architecture_by_name,
            "lab.py",
            "x = 1 if arch in ('arm64', 'riscv') else 2",
        ),
        (
            test_that_nobody_asks_for_the_architecture_by_name,
            "lab.py",
            "match arch:\n    case 'arm64': pass",
        ),
        (
            test_that_what_is_public_is_listed_and_says_what_it_is,
            "lab.py",
            "'doc'\n__all__ = []\nclass A: 'doc'",
        ),
        (
            test_that_what_is_public_is_listed_and_says_what_it_is,
            "lab.py",
            "'doc'\n__all__ = ['A']\nclass A:\n  'doc'\n  def f(self): pass",
        ),
        (test_that_names_say_which_address_space, "lab.py", "def f(addr): pass"),
        (test_that_names_say_which_address_space, "lab.py", "class PageHelper: pass"),
    ],
)
def test_that_a_rule_can_be_broken(rule: Callable[[Module], None], rel: str, source: str) -> None:
    module = Module(PACKAGE / rel)
    module.__dict__["tree"] = ast.parse(source)
    with pytest.raises(AssertionError):
        rule(module)
