"""DataFrames that show addresses in hexadecimal, and keep them as numbers to compute with.

Which columns are addresses goes by their names, so that a part of a table, or one that was sorted
or joined, shows them so too. pandas' own options stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import pandas as pd

__all__ = ["ADDRESSES", "Addresses", "HexFrame"]

ADDRESSES = frozenset({"gva", "gva_end", "gpa", "gpa_end", "hva", "hpa", "pc", "entry"})
"""The names of columns whose numbers are shown in hexadecimal."""


def _hex(value: object) -> str:
    """A number in hexadecimal, anything else as it is."""
    if isinstance(value, Integral):
        return f"{int(value):#x}"
    return str(value)


def _is_address(name: object) -> bool:
    return isinstance(name, str) and name in ADDRESSES


class Addresses(pd.Series):  # type: ignore[misc]
    """A column of a HexFrame, or a row of one."""

    @property
    def _constructor(self) -> Callable[..., Addresses]:
        return Addresses

    @property
    def _constructor_expanddim(self) -> Callable[..., HexFrame]:
        return HexFrame

    def __repr__(self) -> str:
        shown = pd.Series.__repr__(self._shown())
        rows, _, footer = shown.rpartition("\n")
        return f"{rows}\n{footer.replace('dtype: object', f'dtype: {self.dtype}')}"

    def _shown(self) -> pd.Series:
        """The same with addresses as text in hexadecimal."""
        plain = pd.Series(self.array, index=self.index, name=self.name)
        if _is_address(self.name):
            return plain.map(_hex).astype(object)
        if plain.dtype != object:
            return plain
        # A row of a table: its labels are the names of columns.
        at = [_is_address(label) for label in self.index]
        plain[at] = plain[at].map(_hex)
        return plain


class HexFrame(pd.DataFrame):  # type: ignore[misc]
    """A DataFrame whose columns of addresses are shown in hexadecimal: in notebooks and as text."""

    @property
    def _constructor(self) -> Callable[..., HexFrame]:
        return HexFrame

    @property
    def _constructor_sliced(self) -> Callable[..., Addresses]:
        return Addresses

    def _shown(self) -> pd.DataFrame:
        """The same with addresses as text in hexadecimal."""
        plain = pd.DataFrame(self)
        columns = {
            name: plain[name].map(_hex).astype(object)
            for name in plain.columns.unique()
            if _is_address(name) and plain.columns.is_unique
        }
        shown = plain.assign(**columns)
        if _is_address(shown.index.name) and shown.index.nlevels == 1:
            shown.index = shown.index.map(_hex)
        return shown

    def __repr__(self) -> str:
        return repr(self._shown())

    def _repr_html_(self) -> str | None:
        """What notebooks show, as long and as wide as pandas' options say."""
        shown: str | None = self._shown()._repr_html_()
        return shown

    def to_string(self, *args: Any, **options: Any) -> Any:
        """As pandas has it, with addresses in hexadecimal."""
        return self._shown().to_string(*args, **options)

    def to_html(self, *args: Any, **options: Any) -> Any:
        """As pandas has it, with addresses in hexadecimal."""
        return self._shown().to_html(*args, **options)
