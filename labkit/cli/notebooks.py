"""Reading, running and writing notebooks, for the commands that take one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.errors import InvalidState, NotAvailable

__all__ = ["client", "read", "write"]


def read(path: Path) -> Any:
    """A notebook, as nbformat 4; raises NotAvailable for a file that cannot be read, InvalidState for one that is none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    except (ValueError, AttributeError, TypeError, nbformat.ValidationError) as err:
        raise InvalidState(
            f"{path} is not a notebook: {str(err).partition(chr(10))[0][:100]}", path=path
        ) from err


def write(path: Path, notebook: Any) -> None:
    """Write a notebook in one piece, so that a full disk leaves the old one."""
    import nbformat

    new = path.with_suffix(".ipynb.new")
    try:
        nbformat.write(notebook, new)  # type: ignore[no-untyped-call]
        new.replace(path)
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    finally:
        new.unlink(missing_ok=True)


def client(path: Path, notebook: Any) -> Any:
    """What runs its cells: a kernel of this Python, in the notebook's own directory."""
    from nbclient import NotebookClient

    return NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )  # its warning about TCP
