"""The README's picture, light and dark: a real run, drawn by labkit's views, photographed.

python tests/browser/picture.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(Path(__file__).parent)]

from shoot import MARGIN, shoot  # noqa: E402

import labkit as lk  # noqa: E402
from labkit.hosts.buttons import VmController  # noqa: E402
from labkit.views import dashboard  # noqa: E402

WIDTH, HEIGHT = 1400, 1760
PICTURES = REPO / "notebooks" / "pictures"


def moment() -> VmController:
    """Four vCPUs, one of them done, and another about to take a slot."""
    vm = lk.Vm.create(
        lk.Program.load(REPO / "data" / "guests" / "two_vcpus.elf"),
        nr_vcpus=4,
        schedule="round_robin:40",
        name="two_vcpus",
    )
    while vm.vcpus[0].state != "done":
        vm.run()

    controller = VmController(vm)
    controller.act("vcpu", index=2)
    while "will be its own" not in vm.vcpus[2].look().outlook:
        controller.act("step")
    controller.act("select", kind="slot", value=3)
    return controller


def main() -> None:
    """Both themes into notebooks/pictures."""
    controller = moment()
    seen, actions = controller.snapshot(), controller.actions
    view = dashboard.render(seen, width=WIDTH - MARGIN, actions=actions)
    print(view.text)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for theme in ("light", "dark"):
            shot = Path(work) / f"dashboard-{theme}.png"
            shoot(view.page(theme), shot, WIDTH, HEIGHT)
            (PICTURES / shot.name).write_bytes(shot.read_bytes())


if __name__ == "__main__":
    main()
