"""Collecting the tests is quick: nothing is compiled, loaded or run when a test's file is imported.

A guest that several tests share is a cached function or a fixture, compiled when the first of them
runs:

    @cache
    def program() -> lk.Program:
        return lk.Program.compile(SOURCE)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from modules import TEST_MODULES, Function, Module, broken, check, example
from paths import TESTS

# the last words of what starts a compiler, reads an ELF file or makes a VM
SLOW_CALLS = (
    "Program.compile",
    "Program.load",
    "Vm.create",
    "Vm.create_barebones",
    "asm",
    "asm_all",
    "bare",
    "compile_guest",
    "subprocess.run",
    "Popen",
)
# each takes more than a second, because of the parsers in jsonschema
SLOW_IMPORTS = {"jupyterlab", "nbclient", "nbformat"}


def slow_to_import(module: Module) -> Iterator[str]:
    """Slow imports and calls when a file is imported, directly or in a function of its own."""
    for name, line, eager in module.imports:
        if eager and name.partition(".")[0] in SLOW_IMPORTS:
            yield f"{module.rel}:{line} imports {name}; see books.py"
    slow_functions = _slow_functions(module.tree)
    for call in _calls_at_import(module.tree):
        name = ast.unparse(call.func)
        if _is_slow(name) or name in slow_functions:
            yield f"{module.rel}:{call.lineno} calls {name}"


def _is_slow(name: str) -> bool:
    return any(name == slow or name.endswith(f".{slow}") for slow in SLOW_CALLS)


def _slow_functions(tree: ast.Module) -> set[str]:
    """The file's own functions that make a slow call, or call another that does."""
    calls = {
        node.name: {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        for node in tree.body
        if isinstance(node, Function)
    }
    slow: set[str] = set()
    while True:
        more = {
            name
            for name, called in calls.items()
            if called & slow or any(_is_slow(one) for one in called)
        }
        if more == slow:
            return slow
        slow = more


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """The calls outside of functions; a function's decorators and defaults are outside of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            yield from _calls_of_a_definition(child)
        elif not _is_main_guard(child):
            if isinstance(child, ast.Call):
                yield child
            yield from _calls_at_import(child)


def _calls_of_a_definition(node: Function | ast.Lambda) -> Iterator[ast.Call]:
    outside = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    if isinstance(node, Function):
        outside += node.decorator_list
    yield from _calls_at_import(ast.Tuple(outside, ast.Load()))


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def test_that_importing_a_test_compiles_nothing() -> None:
    check(slow_to_import, TEST_MODULES)


@pytest.mark.parametrize(
    "source",
    [
        "P = lk.Program.compile('...')",
        "P = [Program.load(path) for path in paths]",
        "class A:\n    vm = lk.Vm.create(P)",
        "def f(): return guests.asm('nop')\nCODE = f()",
        "def g(): return f()\ndef f(): return asm('nop')\nCODE = {'nop': g()}",
        "@pytest.mark.parametrize('code', [asm('nop')])\ndef test(code): pass",
        "def test(code=asm('nop')): pass",
        "import nbformat",
        "from nbformat import v4",
    ],
)
def test_that_the_rule_can_be_broken(source: str) -> None:
    assert broken(slow_to_import, (example("test_example.py", source, TESTS),))


@pytest.mark.parametrize(
    "source",
    [
        "@cache\ndef program(): return lk.Program.compile('...')",
        "CASES = [lambda: asm('nop')]",
        "PATTERN = re.compile('a')",
        "def read(path):\n    import nbformat",
        "if __name__ == '__main__':\n    asm('nop')",
    ],
)
def test_that_the_rule_can_be_kept(source: str) -> None:
    assert not broken(slow_to_import, (example("test_example.py", source, TESTS),))
