"""The front door: the session's Vm and Vcpu with looking added; it knows all rooms."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.checked import checked
from labkit.hosts.buttons import VmController
from labkit.look.encryption import EncryptionMap
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress
from labkit.look.memory import look_at_memory
from labkit.look.secrets import gpa_of, look_at_encryption, look_at_launch, look_through_both
from labkit.look.snapshots import MemoryMap, VcpuSnapshot, VmSnapshot
from labkit.look.vcpu import look_at_vcpu
from labkit.look.vm import Looking, look_at_vm
from labkit.session import vcpu as session_vcpu
from labkit.session import vm as session_vm
from labkit.session.state import VmState
from labkit.session.turn import look as in_a_pause
from labkit.shown import draw_with, mimebundle

if TYPE_CHECKING:
    from labkit.views.live import Hub
    from labkit.views.widget import LabWidget

__all__ = ["Vcpu", "Vm", "VmState"]


@checked
class Vcpu(session_vcpu.Vcpu):
    """One virtual CPU of a VM: run it, step it, look at it."""

    vm: Vm

    @in_a_pause
    def look(self) -> VcpuSnapshot:
        """Registers, code, stack and what the next instruction touches, as one snapshot.

        `look().since(other)` marks the registers that are not what they were in another.
        """
        return look_at_vcpu(self.vm, self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self.look())


@checked
class Vm(session_vm.Vm):
    """One virtual machine; `Vm.create` makes one with a program, page tables, a pool and vCPUs.

    Looking at it never changes it, nor what another look says: each gives a snapshot of its own,
    and `snapshot.since(other)` is the same with what changed in between marked.
    """

    vcpus: Sequence[Vcpu]
    _hub: Hub | None = None  # what the live views of this VM share, once there is one

    def _new_vcpu(self, index: int) -> Vcpu:
        return Vcpu(self, index)

    @in_a_pause
    def encryption_map(self) -> EncryptionMap:
        """Every range of guest memory: what page tables say of it, what it is, where they disagree.

        Raises InvalidState for a VM that is not protected.
        """
        return look_at_encryption(self)

    @in_a_pause
    def launch_progress(self) -> LaunchProgress:
        """The launch so far: each command and what came of it, the growing digest, the state.

        Raises InvalidState for a VM that is not protected.
        """
        return look_at_launch(self)

    @in_a_pause
    def eyes(self, gpa: int | None = None, gva: str | int | None = None) -> PageEyes:
        """One page, by gpa or gva, through two eyes: the host's and the guest's.

        gva: also a place by name, as in `gva_of`. `.since(other)` marks the bytes that changed.
        Raises InvalidState without exactly one address, PageFault and MemoryFault for one where
        nothing is.
        """
        where = None if gva is None else self.gva_of(gva)
        return look_through_both(self, gpa_of(self, gpa, where))

    @in_a_pause
    def memory_map(self) -> MemoryMap:
        """What lies where in guest-physical memory."""
        return look_at_memory(self)

    @in_a_pause
    def look(self, vcpu: int = 0) -> VmSnapshot:
        """All of the VM as one snapshot that shows itself; `vcpu` is the one in front.

        Raises InvalidState for a vCPU that is not there.
        """
        return look_at_vm(self, Looking(vcpu))

    def show(self, kind: str = "vm") -> LabWidget:
        """A live view that follows the VM: all of it, or one part alone.

        kind: "vm", "stepper", "pool", "pages", "memory", for a protected VM also "encryption",
        "eyes" (the selected page) and "launch"; raises InvalidState for any other. A saved notebook
        keeps its picture, a terminal its text.
        """
        from labkit.views.dashboard import SECRETS
        from labkit.views.live import Hub
        from labkit.views.widget import LabWidget

        if kind in SECRETS:
            self.need_guest()
        if self._hub is None:
            self._hub = Hub(VmController(self))
        return LabWidget(self._hub, kind)

    def close(self) -> None:
        """Release the engine; the VM cannot run afterwards. Its views show what it was last."""
        super().close()
        if self._hub is not None:
            self._hub.close()


def _draw(snapshot: object) -> Any:
    """What a snapshot shows of itself; the views load when the first one does."""
    return import_module("labkit.views.dashboard").bundle(snapshot)


def _save(snapshot: object, path: Path, theme: str) -> None:
    """Its picture as a file."""
    import_module("labkit.views.dashboard").draw(snapshot).save(path, theme)


draw_with(_draw, _save)
