"""How a file is written: sizes, names, what is public, types, and whose names are whose."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from modules import Function, Module, Rule, broken, check, example

MAX_FILE, MAX_FUNCTION = 500, 50  # formatted lines
BAD_NAMES = {"addr", "ptr", "vaddr", "paddr"}
BAD_CLASS = re.compile(r"(Manager|Helper|Utils?|Base)$|_impl$")

# parameters by these names are things of ours, which have a class or a Protocol
OURS = {"vm", "vcpu", "twin", "pool", "space", "memory", "machine"}

# names that only look private, and those that libraries give nowhere else
PUBLIC_IN_SPITE = {
    "_asdict",  # of a NamedTuple
    "_fields",  # of a NamedTuple
    "_replace",  # of a NamedTuple
    "_name",  # of a ctypes.CDLL: the path it was loaded from
    "_get_segment_header",  # of pyelftools: a header without reading what it points to
}


def too_long(module: Module) -> Iterator[str]:
    """Files and functions that are longer than they may be."""
    if module.lines > MAX_FILE:
        yield f"{module.rel} has {module.lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{module.rel}:{node.lineno} {node.name} has {length} lines"


def undocumented(module: Module) -> Iterator[str]:
    """What is public and not in __all__, and what is in it and does not say what it is."""
    if not ast.get_docstring(module.tree):
        yield f"{module.rel} has no docstring"
    listed, defined = _listed(module.tree), _defined(module.tree)
    if listed is None:
        only_a_package = module.path.name == "__init__.py" and not defined
        if not only_a_package:
            yield f"{module.rel} has no __all__"
        return
    for name in defined:
        if not name.startswith("_") and name not in listed:
            yield f"{module.rel}: {name} is neither in __all__ nor private"
    for name in sorted(listed & set(defined)):
        for where, node in _public(name, defined[name]):
            if not ast.get_docstring(node):
                yield f"{module.rel}:{node.lineno} {where} has no docstring"


def _listed(tree: ast.Module) -> set[str] | None:
    """The names in __all__, None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert node.value is not None
            return set(ast.literal_eval(node.value))
    return None


def _defined(tree: ast.Module) -> dict[str, Function | ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, Function | ast.ClassDef)}


def _public(
    name: str, node: Function | ast.ClassDef
) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """The thing itself, and of a class its public methods.

    A property's setter and a line of a Protocol say nothing new.
    """
    yield name, node
    if not isinstance(node, ast.ClassDef) or _is_protocol(node):
        return
    for child in node.body:
        if isinstance(child, Function) and not child.name.startswith("_") and not _is_setter(child):
            yield f"{name}.{child.name}", child


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def _is_setter(node: Function) -> bool:
    attributes = [d.attr for d in node.decorator_list if isinstance(d, ast.Attribute)]
    return "setter" in attributes or "deleter" in attributes


def vague_names(module: Module) -> Iterator[str]:
    """Addresses that do not say of which space, and classes that are no noun from a manual."""
    for node in ast.walk(module.tree):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) if name in BAD_NAMES:
                yield f"{module.rel}:{node.lineno}: {name}; say gva, gpa, hva or hpa"
            case ast.ClassDef(name=name) if BAD_CLASS.search(name):
                yield f"{module.rel}:{node.lineno}: class {name}; a class is a noun from a manual"


def untyped(module: Module) -> Iterator[str]:
    """Parameters and variables for things of ours that are declared as Any."""
    for node in ast.walk(module.tree):
        match node:
            case ast.arg(arg=name, annotation=ast.expr() as annotation):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                pass
            case _:
                continue
        if name in OURS and "Any" in _words(annotation):
            yield f"{module.rel}:{node.lineno}: {name}: {ast.unparse(annotation)}"


def _words(annotation: ast.expr) -> set[str]:
    """`Any | None` is {"Any", "None"}; what stands inside brackets is not looked at."""
    return set(re.split(r" \| ", re.sub(r"\[.*\]", "", ast.unparse(annotation))))


def reaching(module: Module) -> Iterator[str]:
    """Uses of another object's `_name`.

    Its own are those that the class around the use has itself (so that `other._name` in a method is
    fine, and `made._name` in a class method), and those of a module of the standard library or of a
    third party.
    """
    yield from _reaching(module.rel, module.tree, frozenset(), _foreign_modules(module.tree))


def _reaching(rel: str, node: ast.AST, own: frozenset[str], foreign: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        own |= _own_names(node)
    if isinstance(node, ast.Attribute) and _is_private(node.attr):
        allowed = own | PUBLIC_IN_SPITE
        if node.attr not in allowed and not _is_own(node.value, foreign):
            yield f"{rel}:{node.lineno}: {ast.unparse(node)}"
    for child in ast.iter_child_nodes(node):
        yield from _reaching(rel, child, own, foreign)


def _is_private(name: str) -> bool:
    """`_name`; not `__init__`, and not the `_fields_` of ctypes."""
    return name.startswith("_") and not name.endswith("_")


def _is_own(value: ast.expr, foreign: set[str]) -> bool:
    match value:
        case ast.Name(id=name):
            return name in ("self", "cls") or name in foreign
        case ast.Call(func=ast.Name(id="super" | "type")):
            return True
    return False


def _own_names(node: ast.ClassDef) -> set[str]:
    """The attributes that a class has: defined in its body, or used on `self` or `cls`."""
    names = set()
    for child in node.body:
        match child:
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    for child in ast.walk(node):
        match child:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                names.add(name)
    return names


def _foreign_modules(tree: ast.Module) -> set[str]:
    """What `import os` and `import numpy as np` bind; our own modules are other objects."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return {
        alias.asname or alias.name.partition(".")[0]
        for node in imports
        for alias in node.names
        if alias.name.partition(".")[0] != "labkit"
    }


def folded(module: Module) -> Iterator[str]:
    """Conditions that are no `if`: a product with one, a ternary in one, `and` as a statement."""
    for node in ast.walk(module.tree):
        match node:
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                is_folded = _is_condition(left) or _is_condition(right)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                is_folded = any(isinstance(part, ast.IfExp) for part in (test, body, orelse))
            case ast.Expr(value=value):
                is_folded = isinstance(value, ast.BoolOp | ast.IfExp)
            case _:
                is_folded = False
        if is_folded:
            yield f"{module.rel}:{node.lineno}: {ast.unparse(node)[:80]}"


def _is_condition(node: ast.expr) -> bool:
    match node:
        case ast.Compare() | ast.UnaryOp(op=ast.Not()) | ast.BoolOp(op=ast.And()):
            return True
        case ast.Call(func=ast.Name(id="bool")):
            return True
    return False


def test_that_files_and_functions_are_short() -> None:
    check(too_long)


def test_that_what_is_public_is_listed_and_says_what_it_is() -> None:
    check(undocumented)


def test_that_names_say_which_address_space() -> None:
    check(vague_names)


def test_that_a_vm_is_not_any() -> None:
    check(untyped)


def test_that_nobody_touches_another_objects_names() -> None:
    check(reaching)


def test_that_a_condition_is_an_if() -> None:
    check(folded)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (folded, "text = 's' * (count != 1)"),
        (folded, "rows = [row] * bool(row)"),
        (folded, "word = 'a' if x else 'b' if y else 'c'"),
        (folded, "found and print(found)"),
        (too_long, "x = 1\n" * 501),
        (too_long, "def f():\n" + "    x = 1\n" * 50),
        (undocumented, "'doc'\n__all__ = []\nclass A: 'doc'"),
        (undocumented, "'doc'\n__all__ = ['A']\nclass A:\n  'doc'\n  def f(self): pass"),
        (undocumented, "'doc'\ndef f(): 'doc'"),
        (undocumented, "__all__ = []"),
        (vague_names, "def f(addr): pass"),
        (vague_names, "class PageHelper: pass"),
        (untyped, "def f(vm: Any): pass"),
        (untyped, "def f(a, *, vcpu: Any | None = None): pass"),
        (untyped, "class A:\n    vm: Any"),
        (reaching, "def f(vm): return vm._pool"),
        (reaching, "class A:\n    def f(self): return self.vm._pool"),
        (reaching, "from labkit import lab\nlab._open()"),
        (reaching, "import labkit.lab as lab\nlab._open()"),
        (reaching, "def f(vm):\n    vm._pool = 1"),
    ],
)
def test_that_a_rule_can_be_broken(rule: Rule, source: str) -> None:
    assert broken(rule, (example("lab.py", source),))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (folded, "size = (count or 1) * 8\nword = 'a' if x else 'b'"),
        (too_long, "def f():\n" + "    x = 1\n" * 49),
        (untyped, "def f(vm: Vm, vms: list[Any], read: Callable[[Any], int]): pass"),
        (reaching, "import os\nos._exit(1)"),
        (
            reaching,
            "class A:\n    def __init__(self): self._x = 1\n    def f(self, o): return o._x",
        ),
        (reaching, "class A:\n    def f(self): return super()._x, type(self)._y"),
        (reaching, "made = facts._replace(step=1)\nStruct._fields_"),
    ],
)
def test_that_a_rule_can_be_kept(rule: Rule, source: str) -> None:
    assert not broken(rule, (example("lab.py", source),))
