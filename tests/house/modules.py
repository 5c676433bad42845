"""The source files, and what every house rule is: a function from a file to what is wrong in it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from paths import REPO, TESTS

PACKAGE = REPO / "labkit"
Function = ast.FunctionDef | ast.AsyncFunctionDef
# yields "what.py:12 does this and should do that"
Rule = Callable[["Module"], Iterator[str]]


@dataclass(frozen=True)
class Module:
    """One source file; its name is relative to `top`."""

    path: Path
    top: Path = PACKAGE

    @property
    def rel(self) -> str:
        """Path below the top directory."""
        return self.path.relative_to(self.top).as_posix()

    @property
    def room(self) -> str:
        """The room it belongs to; "" is labkit/__init__.py."""
        first = self.rel.partition("/")[0].removesuffix(".py")
        return "" if first == "__init__" else first

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.path.read_text())

    @cached_property
    def lines(self) -> int:
        """How many lines it has."""
        return self.path.read_text().count("\n")

    @cached_property
    def imports(self) -> tuple[tuple[str, int, bool], ...]:
        """(dotted name, line, whether that runs when the module is imported) of all imports."""
        eager = set(_eager(self.tree.body))
        return tuple(
            (name, node.lineno, node in eager)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in _names(node)
        )


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that one statement imports; a relative import keeps its dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module == "labkit":
        return [f"labkit.{alias.name}" for alias in node.names]
    return ["." * node.level + (node.module or "")]


def _eager(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported, those under TYPE_CHECKING left out."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _eager(getattr(node, part, []))


MODULES = tuple(Module(path) for path in sorted(PACKAGE.rglob("*.py")))
TEST_MODULES = tuple(Module(path, TESTS) for path in sorted(TESTS.rglob("*.py")))


def broken(rule: Rule, modules: tuple[Module, ...] = MODULES) -> list[str]:
    """Every place that breaks a rule."""
    return [place for module in modules for place in rule(module)]


def check(rule: Rule, modules: tuple[Module, ...] = MODULES) -> None:
    """Fail with the list of all places that break a rule."""
    places = broken(rule, modules)
    if places:
        pytest.fail("\n".join([f"{len(places)} places:", *places]), pytrace=False)


def example(rel: str, source: str, top: Path = PACKAGE) -> Module:
    """A file that is not there, for the tests that a rule can be broken."""
    module = Module(top / rel, top)
    module.__dict__["tree"] = ast.parse(source)
    module.__dict__["lines"] = source.count("\n")
    return module
