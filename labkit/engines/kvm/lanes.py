"""Parallel vCPUs: a thread each, which alone is in its vCPU while it runs, and hands it back with every exit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from labkit.engines.base import Exit, InterruptExit
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["Lanes"]

Came = Exit | BaseException
LOOK_UP = 0.05  # seconds between two looks for Ctrl-C while nothing comes in


class _Lane:
    """The thread of one vCPU; it waits outside the guest until it is told to go on."""

    def __init__(self, vcpu: KvmVcpu, post: Callable[[int, Came], None]) -> None:
        self.vcpu, self.post = vcpu, post
        self._go, self._parked = threading.Semaphore(0), threading.Event()
        self._end = self.running = False
        self.thread = threading.Thread(
            target=self._loop, name=f"labkit-vcpu-{vcpu.index}", daemon=True
        )
        self.thread.start()

    def go(self) -> None:
        """Let it run."""
        self.running = True
        self._parked.clear()
        self._go.release()

    def pause(self) -> None:
        """Bring it out of the guest; returns when it is out."""
        if self.running:
            self.vcpu.pausing = True
            self.vcpu.kick()
            self._parked.wait()
        self.vcpu.pausing = False  # also when it came out by itself before it was waited for

    def end(self) -> None:
        """Pause it for good."""
        self.pause()
        self._end = True
        self._go.release()
        self.thread.join()

    def _loop(self) -> None:
        vcpu = self.vcpu
        while True:
            self._go.acquire()
            if self._end:
                return
            vcpu.owner, vcpu.tid = threading.get_ident(), threading.get_native_id()
            try:
                came: Came = vcpu.run_here(None)
            except BaseException as err:
                came = err
            vcpu.owner, vcpu.tid = vcpu.home
            if not (vcpu.pausing and isinstance(came, InterruptExit)):
                self.post(vcpu.index, came)
            self.running = False
            self._parked.set()


class Lanes:
    """All lanes of a VM; the thread that made the VM takes what they bring, one after the other."""

    def __init__(self, vm: KvmVm) -> None:
        self.vm = vm
        self.lanes: dict[int, _Lane] = {}
        self.arrivals: queue.Queue[int] = (
            queue.Queue()
        )  # a SimpleQueue waits for ever if a signal comes as its time ends
        self.posted: dict[
            int, Came
        ] = {}  # what nobody has taken yet; an exit lies with its vCPU too, as a part of its state

    def _post(self, index: int, came: Came) -> None:
        if isinstance(came, Exit):
            self.vm.vcpus[index].queue.insert(0, came)
        self.posted[index] = came
        self.arrivals.put(index)

    def run(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run until any of them exits; the others go on meanwhile, until `end` or somebody touches them."""
        with self.vm.shield.held():
            for index in indices:
                if index not in self.lanes:
                    self.vm.vcpus[index].mine()
                    self.lanes[index] = _Lane(self.vm.vcpus[index], self._post)
                if (
                    not self.lanes[index].running and index not in self.posted
                ):  # asked in this order: it posts, then stops running
                    self.lanes[index].go()
        index, came = self._next()
        if isinstance(came, BaseException):
            raise came
        return index, came

    def _next(self) -> tuple[int, Came]:
        shield = self.vm.shield
        shield.enter(lambda: None)
        try:
            while True:
                try:
                    index = self.arrivals.get(timeout=LOOK_UP)
                except queue.Empty:
                    if shield.interrupted:
                        return next(iter(self.lanes)), InterruptExit()
                    continue
                if (
                    came := self.posted.pop(index, None)
                ) is not None:  # None: another state was put there, or somebody took it
                    if index in self.lanes:
                        self.lanes[
                            index
                        ].pause()  # it is about to park, and must have before it can be told to go on
                    del self.vm.vcpus[index].queue[: isinstance(came, Exit)]
                    return index, came
        finally:
            shield.leave()

    def pause(self, vcpu: KvmVcpu) -> None:
        """Bring one vCPU out of the guest because its owner wants to touch it; any other thread is refused."""
        lane = self.lanes.get(vcpu.index)
        if lane is None or threading.get_ident() != vcpu.home[0]:
            raise InvalidState(
                f"vCPU {vcpu.index} belongs to thread {vcpu.owner:#x}, which alone may touch it; this is thread "
                f"{threading.get_ident():#x}: make the VM where it is used, or hand over what you need as data"
            )
        with self.vm.shield.held():
            lane.pause()

    def end(self) -> None:
        """Stop all; what came in and was not taken is taken by the next run."""
        with self.vm.shield.held():
            for lane in self.lanes.values():
                lane.vcpu.pausing = lane.running
                if lane.running:
                    lane.vcpu.kick()
            for lane in self.lanes.values():
                lane.end()
            self.lanes.clear()
