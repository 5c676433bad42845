"""What is saved of a notebook's widgets: those that a page can restore, of others the picture."""

from __future__ import annotations

import copy
from typing import Any

from labkit.cli.saved import prefer_pictures

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def notebook(saved: list[str], **more: str) -> dict[str, Any]:
    data = {VIEW: {"model_id": "m1"}, "text/plain": "guest", **more}
    cells = [
        {"cell_type": "markdown", "source": ""},
        {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": data}]},
        {"cell_type": "code", "outputs": [{"output_type": "stream", "text": "x"}]},
    ]
    state = {STATE: {"state": {name: {} for name in saved}}}
    return {"type": "notebook", "content": {"cells": cells, "metadata": {"widgets": state}}}


def shown(model: dict[str, Any]) -> set[str]:
    prefer_pictures(model=model, path="x.ipynb", contents_manager=None)
    return set(model["content"]["cells"][1]["outputs"][0]["data"])


def test_that_a_widget_without_saved_state_becomes_its_picture() -> None:
    assert shown(notebook([], **{"text/html": "<img>"})) == {"text/html", "text/plain"}


def test_that_a_widget_with_saved_state_stays() -> None:
    assert VIEW in shown(notebook(["m1"], **{"text/html": "<img>"}))


def test_that_a_widget_without_a_picture_stays_what_it_is() -> None:
    """A slider of somebody else's has no other form."""
    assert VIEW in shown(notebook([]))


def test_that_other_files_are_saved_as_they_are() -> None:
    for model in (
        {"type": "file", "content": "text"},
        {"type": "notebook"},
        {"type": "notebook", "content": {"cells": [{"cell_type": "raw"}], "metadata": {}}},
    ):
        before = copy.deepcopy(model)
        prefer_pictures(model=model, path="x", contents_manager=None)
        assert model == before
