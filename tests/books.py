"""Notebooks made for tests.

nbformat is imported when the first one is made and not with this file: its JSON schema builds 39
parsers, which takes 1.6 s, as long as collecting a third of all tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["code", "markdown", "notebook", "output", "raw", "read", "write"]


def notebook(*cells: Any) -> Any:
    """A notebook of these cells."""
    from nbformat import v4

    return v4.new_notebook(cells=list(cells))


def code(source: str, *outputs: Any, **metadata: Any) -> Any:
    """A code cell and what it shows."""
    from nbformat import v4

    return v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def markdown(source: str) -> Any:
    """A cell of prose."""
    from nbformat import v4

    return v4.new_markdown_cell(source)


def raw(source: str) -> Any:
    """A cell that is neither."""
    from nbformat import v4

    return v4.new_raw_cell(source)


def output(kind: str, **facts: Any) -> Any:
    """One output of a code cell: a "stream", "display_data" or "execute_result"."""
    from nbformat import v4

    return v4.new_output(kind, **facts)


def read(path: Path) -> Any:
    """The notebook in a file."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    """Write a notebook into a file."""
    import nbformat

    nbformat.write(notebook, path)
