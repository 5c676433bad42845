"""What JupyterLab does when it saves a notebook: outputs that nobody could restore keep a picture.

A view of labkit is an output in several forms: a live widget, a picture, a text. JupyterLab shows
the first it knows, and for a widget whose kernel was restarted that is "model not found".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["prefer_pictures"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def prefer_pictures(model: Mapping[str, Any], **_: object) -> None:
    """A pre_save_hook of Jupyter's contents manager: drop widgets that are not saved with it.

    What JupyterLab saves of widgets (its setting saveState) is of those whose kernel is there. Of
    the others the output keeps its picture and its text, where it has any.
    """
    notebook = model.get("content")
    if model.get("type") != "notebook" or not isinstance(notebook, dict):
        return
    saved = _saved_models(notebook)
    for data in _bundles(notebook):
        view = data.get(WIDGET_VIEW)
        is_saved = isinstance(view, dict) and view.get("model_id") in saved
        if not is_saved and "text/html" in data:
            del data[WIDGET_VIEW]


def _saved_models(notebook: Mapping[str, Any]) -> frozenset[str]:
    """The identifiers of the widgets whose state is in the notebook."""
    state = notebook.get("metadata", {}).get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    return frozenset(state)


def _bundles(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The outputs that have a widget, as MIME type -> data."""
    for cell in notebook.get("cells", ()):
        for output in cell.get("outputs", ()):
            data = output.get("data")
            if isinstance(data, dict) and WIDGET_VIEW in data:
                yield data
