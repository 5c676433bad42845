"""Reading, running and writing notebooks, for the commands that take one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import InvalidState, NotAvailable
from labkit.session.progress import DISABLE

if TYPE_CHECKING:
    from nbclient import NotebookClient

__all__ = ["clean_up", "client", "environment", "read", "write"]


def read(path: Path) -> Any:
    """A notebook, as a NotebookNode of nbformat 4.

    Raises NotAvailable for a file that cannot be read, InvalidState for one that is no notebook.
    """
    import nbformat

    try:
        return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    except (ValueError, AttributeError, TypeError, nbformat.ValidationError) as err:
        first_line = str(err).partition("\n")[0]
        raise InvalidState(f"{path} is not a notebook: {first_line[:100]}", path=path) from err


def write(path: Path, notebook: Any) -> None:
    """Write a notebook in one piece, so that a full disk leaves the old one.

    Raises NotAvailable when the file cannot be written.
    """
    import nbformat

    new = _unfinished(path)
    try:
        nbformat.write(notebook, new)  # type: ignore[no-untyped-call]
        new.replace(path)
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
    finally:
        new.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """Where a notebook is written before it takes the old one's place."""
    return path.with_suffix(".ipynb.new")


def clean_up(path: Path) -> bool:
    """Remove what a write of this notebook that was killed had left; whether there was any."""
    left = _unfinished(path)
    if not left.is_file() or left.is_symlink():
        return False
    try:
        left.unlink()
    except OSError as err:
        raise NotAvailable(f"{left}: {err.strerror}", path=left) from err
    return True


def client(path: Path, notebook: Any) -> NotebookClient:
    """What runs its cells: a kernel of this Python, in the notebook's own directory.

    Long runs show no line of progress in it: nobody waits there, and it would stay in the outputs.
    """
    from nbclient import NotebookClient

    return NotebookClient(
        notebook,
        timeout=600,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        coalesce_streams=True,
        # without this the kernel warns about its TCP ports
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )


def environment() -> dict[str, str]:
    """What the kernel of such a client is started with: no line of progress stays in outputs."""
    return {DISABLE: "1", **os.environ}
