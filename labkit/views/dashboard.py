"""vm.show(): every view of one VM, with one step and one selection."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from labkit.explore.comparison import Comparison
from labkit.look.encryption import EncryptionMap
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress
from labkit.look.snapshots import MemoryMap, VcpuSnapshot, VmSnapshot
from labkit.outside import plain
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk
from labkit.ucall.snapshot import PoolSnapshot
from labkit.views import compare, encryption, eyes, launch, memory, pages, pool, said, stepper
from labkit.views.drawing.markup import Html, cat
from labkit.views.drawing.tables import label
from labkit.views.pictures import timeline
from labkit.views.scene import Memo, Scene
from labkit.views.show import FRAME, Bundle, View, columns, header, mimebundle, pane, status_line
from labkit.words import num, plural

__all__ = ["PANES", "SECRETS", "VIEWS", "bundle", "draw", "render"]

# Of all kinds of widget: each is a trait of its own, so that only what changed is sent.
# fmt: off
PANES = (
    "title", "transport", "timeline", "status",
    "source", "disassembly", "registers", "stack", "touches",
    "pool", "card", "poolkey", "held", "rail",
    "memory", "walk", "ruler", "ranges", "changes",
    "said", "log", "frames",
    "problems", "dump", "blocks", "words", "states", "pages", "steps", "owner",
)
# fmt: on
HEAD = cat(
    [
        *map(pane, ("title", "transport", "timeline", "status", "said")),
        columns(
            "c2 dash",
            columns("two", *map(pane, ("source", "disassembly", "touches", "frames"))),
            pane("registers"),
        ),
        *map(pane, ("pool", "poolkey", "rail", "log", "memory")),
    ]
)
LAYOUT = HEAD + pane("walk")
SECRET_LAYOUT = HEAD + cat(  # of a protected VM
    [pane("problems"), eyes.SIDES, *map(pane, ("walk", "states", "owner"))]
)
CLOSED = "closed"  # the state of a VM of which there is nothing to see any longer
SECRETS = ("encryption", "eyes", "launch")  # views that only a protected VM has


def render(
    vm: VmSnapshot,
    previous: VmSnapshot | None = None,
    *,
    width: float = 940,
    kind: str = "vm",
    actions: Collection[str] = (),
    pinned: int | None = None,
    memo: Memo | None = None,
) -> View:
    """A whole VM as a view, or with kind one part of it (one of VIEWS).

    Changes are marked against previous; where it has not what is shown, as the snapshot says.
    actions get a button; pinned is the gva of a second ruler. memo keeps what was drawn for the
    next time.
    """
    scene = Scene(vm, previous, width, actions, pinned, {} if memo is None else memo)
    view = VIEWS[kind](scene)
    if vm.state != CLOSED:
        return view
    said = plain(vm.status, 400)
    return replace(view, status=said, panes={**view.panes, "status": status_line(said)})


def _dash(scene: Scene) -> View:
    """All of it."""
    vm = scene.vm
    is_protected = vm.encryption is not None
    code, slots, walk = scene.stepper(), scene.pool(fold=True), scene.pages()
    if is_protected:
        inside = [scene.encryption(), scene.eyes(), scene.launch()]
    else:
        inside = [scene.memory()]
    layout = SECRET_LAYOUT if is_protected else LAYOUT
    parts = [code, slots, *inside, walk]
    sentence = plain(vm.status, 400) if vm.status else code.status

    panes = _panes_of(parts, layout)
    panes["title"] = header(plain(vm.name), _facts(vm), vm.step)
    panes["timeline"] = timeline.draw(vm, scene.width - FRAME)
    panes["status"] = status_line(sentence, "status top")
    panes["said"] = said.card(vm)
    panes["log"] = said.log(vm)
    panes["rail"] = walk.panes["rail"]
    panes["walk"] = label("Page walk", f"of {_walk_of(vm)}: {walk.status}") + walk.panes["walk"]
    if is_protected:
        panes["states"] = label("Launch", inside[-1].status) + panes["states"]
    title = f"{plain(vm.name)}, {plain(vm.arch)}, {plain(vm.engine)}, step {num(vm.step)}"
    return View(title, sentence, panes, layout, lambda: _lines(vm, parts))


def _panes_of(parts: Collection[View], layout: Html) -> dict[str, Html]:
    """The panes that have a place in a layout; of two with one name the later part's."""
    out = {}
    for part in parts:
        for name, body in part.panes.items():
            if f'data-pane="{name}"' in layout:
                out[name] = body
    return out


def _facts(vm: VmSnapshot) -> list[str]:
    """For the header: what the VM is, and how it is."""
    nr_vcpus = len(vm.vcpus)
    facts = [
        vm.arch,
        vm.engine,
        vm.protection,
        f"{nr_vcpus} {plural('vCPU', nr_vcpus)}",
        vm.schedule,
        vm.state,
    ]
    return [plain(fact, 60) for fact in facts if fact]


def _walk_of(vm: VmSnapshot) -> str:
    """Of what scene.walked() is the walk, in words."""
    if vm.selection is not None and vm.selection.gva is not None:
        return "the selection"
    if vm.front is None:
        return "gva 0"
    return "the page above" if vm.front.sealed else "the next instruction"


def _lines(vm: VmSnapshot, parts: Collection[View]) -> list[str]:
    """What happened and all parts for a terminal, apart by an empty line."""
    out = [*said.card_text(vm), *said.log_text(vm)]
    for part in parts:
        out += ["", part.status, *part.lines()]
    return out


VIEWS: dict[str, Callable[[Scene], View]] = {
    "vm": _dash,
    "stepper": Scene.stepper,
    "pool": Scene.pool,
    "pages": Scene.pages,
    "memory": Scene.memory,
    "encryption": Scene.encryption,
    "eyes": Scene.eyes,
    "launch": Scene.launch,
}


def _render_walk(walk: Walk) -> View:
    """A walk that a user has in hand, with the snapshot that it was made in where there is one."""
    return pages.render_walk(walk, walk.page_table)


# Who draws a snapshot that a user has in hand.
DRAWN_BY: dict[type, Callable[..., View]] = {
    VmSnapshot: render,
    VcpuSnapshot: stepper.render,
    PoolSnapshot: pool.render,
    MemoryMap: memory.render,
    PageTable: pages.render,
    Walk: _render_walk,
    EncryptionMap: encryption.render,
    PageEyes: eyes.render,
    LaunchProgress: launch.render,
    Comparison: compare.render,
}


def draw(snapshot: object) -> View:
    """The view of a snapshot of any kind; raises TypeError for what is no snapshot."""
    found = DRAWN_BY.get(type(snapshot))
    if found is None:
        raise TypeError(f"{type(snapshot).__name__} is no snapshot")
    return found(snapshot)


def bundle(snapshot: object) -> Bundle:
    """What a snapshot of any kind shows of itself: pictures in a notebook, text in a terminal.

    Raises TypeError for what is no snapshot.
    """
    return mimebundle(draw(snapshot))
