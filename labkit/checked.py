"""What public calls take: a wrong type is refused in a sentence, before anything is done.

The types are those that a function declares. A whole number of another library (numpy's, out of a
DataFrame) becomes an int on the way in, so that addresses from tables can be handed back.
"""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import wraps
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, is_typeddict

from labkit.errors import InvalidState

__all__ = ["checked", "checks_itself", "whole"]

Thing = TypeVar("Thing", bound=Callable[..., Any])
Judge = Callable[[object], object]  # gives the value as it shall go in; raises _Wrong

MARK = "__checks_its_arguments__"


class _Wrong(Exception):
    """A value that is not of the type that is wanted."""


@dataclass(frozen=True)
class _Wanted:
    """What one parameter takes: types that need no second look, a judge for others, and words."""

    plain: frozenset[type]
    judge: Judge
    words: str


def whole(value: object, what: str) -> int:
    """A whole number as an int; raises InvalidState for anything else, which `what` names."""
    try:
        return _index(value)
    except _Wrong:
        raise InvalidState(f"{what} takes a whole number, not {_shown(value)}") from None


def checks_itself(function: Thing) -> Thing:
    """Mark a public function that looks at its arguments itself, because it must be fast."""
    setattr(function, MARK, True)
    return function


def checked(thing: Thing) -> Thing:
    """A function whose arguments are checked, or a class with all its public methods so.

    A wrong one is InvalidState, which says the function, the parameter, what it takes and what it
    got. Parameters without a type of their own (Any, object) take everything.
    """
    if isinstance(thing, type):
        _check_class(thing)
        return thing
    return cast(Thing, _checked_function(thing, thing.__name__))


def _check_class(kind: type) -> None:
    for name, member in list(vars(kind).items()):
        is_made = name == "__init__" and not is_dataclass(kind)
        if name.startswith("_") and not is_made:
            continue
        label = kind.__name__ if is_made else f"{kind.__name__}.{name}"
        replacement = _checked_member(member, label, kind)
        if replacement is not member:
            setattr(kind, name, replacement)


def _checked_member(member: object, label: str, kind: type) -> object:
    match member:
        case classmethod():
            return classmethod(_checked_function(member.__func__, label, kind))
        case staticmethod():
            return staticmethod(_checked_function(member.__func__, label, kind))
        case property(fset=FunctionType() as setter):
            return member.setter(_checked_function(setter, label, kind))
        case FunctionType():
            return _checked_function(member, label, kind)
    return member


def _checked_function(
    function: Callable[..., Any], label: str, kind: type | None = None
) -> Callable[..., Any]:
    """The function with a check in front; itself where there is nothing to check.

    kind: the class that it is a method of, whose name is not bound yet.
    """
    if getattr(function, MARK, False):
        return function
    by_position, by_name, rest = _wanted_of(function, kind)
    if not any(by_name.values()) and rest is None:
        return function
    names = [name for name, _ in by_position]
    wants = [want for _, want in by_position]

    @wraps(function)
    def in_order(*args: Any, **kwargs: Any) -> Any:
        # Most calls end here: all types are plain ones.
        for value, want in zip(args, wants, strict=False):
            if want is not None and type(value) not in want.plain:
                args = _judged(label, names, wants, args)
                break
        if rest is not None and len(args) > len(wants):
            extra = [_judge(label, rest[0], rest[1], value) for value in args[len(wants) :]]
            args = (*args[: len(wants)], *extra)
        for name, value in kwargs.items():
            want = by_name.get(name)
            if want is not None and type(value) not in want.plain:
                kwargs[name] = _judge(label, name, want, value)
        return function(*args, **kwargs)

    setattr(in_order, MARK, True)
    return in_order


Rest = tuple[str, _Wanted]


def _wanted_of(
    function: Callable[..., Any], kind: type | None
) -> tuple[list[tuple[str, _Wanted | None]], dict[str, _Wanted | None], Rest | None]:
    """What a function takes by position, by name, and as *rest; None for what takes everything."""
    names = dict(getattr(inspect.unwrap(function), "__globals__", {}))
    if kind is not None:
        names[kind.__name__] = kind
    by_position: list[tuple[str, _Wanted | None]] = []
    by_name: dict[str, _Wanted | None] = {}
    rest: Rest | None = None
    for parameter in inspect.signature(function).parameters.values():
        want = _wanted(_evaluated(parameter.annotation, names))
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = None if want is None else (parameter.name, want)
        elif parameter.kind is not parameter.VAR_KEYWORD:
            by_name[parameter.name] = want
            if parameter.kind is not parameter.KEYWORD_ONLY:
                by_position.append((parameter.name, want))
    return by_position, by_name, rest


def _evaluated(annotation: object, names: dict[str, Any]) -> object:
    """An annotation as an object; Any for none, and for one that only type checkers know."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except NameError:
        return Any


def _judged(
    label: str, names: Sequence[str], wants: Sequence[_Wanted | None], args: tuple[Any, ...]
) -> tuple[Any, ...]:
    judged = list(args)
    for index, (name, want) in enumerate(zip(names[: len(args)], wants, strict=False)):
        if want is not None:
            judged[index] = _judge(label, name, want, args[index])
    return tuple(judged)


def _judge(label: str, name: str, want: _Wanted, value: object) -> object:
    if type(value) in want.plain:
        return value
    try:
        return want.judge(value)
    except _Wrong:
        raise InvalidState(
            f"{label}: {name} takes {want.words}, not {_shown(value)}", parameter=name
        ) from None


def _shown(value: object) -> str:
    """A value for a sentence: short, and with its type where that does not show."""
    if value is None or isinstance(value, bool):
        return repr(value)
    return f"{reprlib.repr(value)} ({type(value).__name__})"


# --- what an annotation wants


def _wanted(kind: object) -> _Wanted | None:
    """What a type takes; None where everything, or nothing that can be judged."""
    if kind in SIMPLE:
        return SIMPLE[cast(type, kind)]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _either([_wanted(argument) for argument in arguments])
    if origin is Literal:
        return _one_of(arguments)
    if origin is not None:
        return _container(origin, arguments)
    if kind is Any or kind is object or is_typeddict(kind):
        return None
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return _instance(kind, f"a {kind.__name__}")
    return None


def _index(value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _Wrong from None


def _number(value: object) -> object:
    if not isinstance(value, float):
        return _index(value)
    return value


def _yes_or_no(value: object) -> bool:
    found = value
    if type(value).__name__ != "bool":  # numpy's is called so too
        found = _index(value)
    if found not in (0, 1):
        raise _Wrong
    return bool(found)


def _octets(value: object) -> object:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _Wrong
    return bytes(value)


def _instance(kind: type, words: str, plain: Iterable[type] = ()) -> _Wanted:
    def judge(value: object) -> object:
        if not isinstance(value, kind):
            raise _Wrong
        return value

    return _Wanted(frozenset(plain or (kind,)), judge, words)


SIMPLE: Mapping[type | None, _Wanted] = {
    int: _Wanted(frozenset({int}), _index, "a whole number"),
    float: _Wanted(frozenset({int, float}), _number, "a number"),
    bool: _Wanted(frozenset({bool}), _yes_or_no, "True or False"),
    str: _instance(str, "text"),
    bytes: _Wanted(frozenset({bytes}), _octets, "bytes"),
    None: _instance(NoneType, "None"),
    NoneType: _instance(NoneType, "None"),
}


def _either(wants: Sequence[_Wanted | None]) -> _Wanted | None:
    """What one of several takes."""
    known = [want for want in wants if want is not None]
    if len(known) < len(wants):
        return None

    def judge(value: object) -> object:
        for want in known:
            try:
                return want.judge(value)
            except _Wrong:
                continue
        raise _Wrong

    plain = frozenset().union(*(want.plain for want in known))
    return _Wanted(plain, judge, " or ".join(want.words for want in known))


def _one_of(values: Sequence[object]) -> _Wanted:
    def judge(value: object) -> object:
        if not any(type(value) is type(one) and value == one for one in values):
            raise _Wrong
        return value

    return _Wanted(frozenset(), judge, " or ".join(map(repr, values)))


def _container(origin: Any, arguments: Sequence[object]) -> _Wanted | None:
    """A list, tuple, set, mapping or function: itself and, if it holds one kind, each element."""
    if origin is Callable:
        return _callable()
    if not isinstance(origin, type) or origin is type:
        return None
    words = f"a {origin.__name__.lower()}"
    if issubclass(origin, tuple) and Ellipsis in arguments:
        origin = Sequence
    if issubclass(origin, Mapping | tuple) or not issubclass(origin, Iterable):
        return _instance(origin, words)
    return _elements(origin, words, _wanted(arguments[0]) if arguments else None)


def _elements(origin: type[Iterable[object]], words: str, element: _Wanted | None) -> _Wanted:
    """A container of some kind in which each element is judged."""
    if element is not None:
        words += f" of {element.words}"

    def judge(value: object) -> object:
        # A text is a sequence of texts, but never one that was meant.
        if not isinstance(value, origin) or isinstance(value, str | bytes):
            raise _Wrong
        if element is not None:
            for one in value:
                if type(one) not in element.plain:
                    element.judge(one)
        return value

    return _Wanted(frozenset(), judge, words)


def _callable() -> _Wanted:
    def judge(value: object) -> object:
        if not callable(value):
            raise _Wrong
        return value

    return _Wanted(frozenset({FunctionType}), judge, "a function")
