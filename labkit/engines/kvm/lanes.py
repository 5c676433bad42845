"""Parallel vCPUs: a thread each.

While a vCPU runs, its thread alone is in it; with every exit it is handed back to the thread that
made the VM.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from labkit.engines.exits import Exit, InterruptExit, StopExit
from labkit.engines.kvm.waiting import Came

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["Lanes"]

LOOK_UP = 0.05  # seconds between two looks for Ctrl-C while nothing comes in


class _Lane:
    """The thread of one vCPU; it waits outside the guest until it is told to go on."""

    def __init__(self, vcpu: KvmVcpu, post: Callable[[int, Came], None]) -> None:
        self.vcpu = vcpu
        self.running = False
        self._post = post
        self._go = threading.Semaphore(0)
        self._parked = threading.Event()
        self._end = False
        self.thread = threading.Thread(
            target=self._loop, name=f"labkit-vcpu-{vcpu.index}", daemon=True
        )
        self.thread.start()

    def go(self) -> None:
        """Let it run."""
        self.running = True
        self._parked.clear()
        self._go.release()

    def ask_to_pause(self) -> None:
        """Bring it out of the guest soon, if it is there."""
        self.vcpu.pausing = self.running
        if self.running:
            self.vcpu.kick()

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
        while True:
            self._go.acquire()
            if self._end:
                return
            came = self._run()
            only_paused = self.vcpu.pausing and isinstance(came, InterruptExit)
            if not only_paused:
                self._post(self.vcpu.index, came)
            self.running = False
            self._parked.set()

    def _run(self) -> Came:
        """One run of the vCPU, which is this thread's until it is over."""
        vcpu = self.vcpu
        vcpu.owner, vcpu.tid = threading.get_ident(), threading.get_native_id()
        try:
            return vcpu.run_here(None)
        except BaseException as err:
            return err
        finally:
            vcpu.owner, vcpu.tid = vcpu.home


class Lanes:
    """All lanes of a VM; the thread that made the VM takes what they bring, one after the other."""

    def __init__(self, vm: KvmVm) -> None:
        self.vm = vm
        self.lanes: dict[int, _Lane] = {}
        # Who has posted something; a SimpleQueue waits for ever if a signal comes as its time ends.
        self.arrivals: queue.Queue[int] = queue.Queue()

    def _post(self, index: int, came: Came) -> None:
        """A lane brings something: it lies with its vCPU until somebody takes it."""
        self.vm.vcpus[index].waiting.post(came)
        self.arrivals.put(index)

    def run(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run until any of them exits.

        The others go on meanwhile, until `end`, or until somebody touches them.
        """
        with self.vm.shield.held():
            for index in indices:
                self._let_run(index)
        index, came = self._next(indices)
        if isinstance(came, BaseException):
            raise came
        return index, came

    def _let_run(self, index: int) -> None:
        """Unless it runs already, or what it brought was not taken."""
        vcpu = self.vm.vcpus[index]
        lane = self.lanes.get(index)
        if lane is None:
            vcpu.mine()
            lane = self.lanes[index] = _Lane(vcpu, self._post)
        # Asked in this order: a lane posts, then stops running.
        if not lane.running and vcpu.waiting.posted is None:
            lane.go()

    def _next(self, indices: Sequence[int]) -> tuple[int, Came]:
        shield = self.vm.shield
        shield.enter(lambda: None)
        try:
            while True:
                try:
                    index = self.arrivals.get(timeout=LOOK_UP)
                except queue.Empty:
                    if shield.is_due():
                        return next(iter(self.lanes)), InterruptExit()
                    if self.vm.asked and self._is_over(indices):
                        return next(iter(self.lanes)), StopExit()
                    continue
                came = self._take(index)
                if came is not None:
                    return index, came
        finally:
            shield.leave()

    def _is_over(self, indices: Sequence[int]) -> bool:
        """Stand still for those who asked; whether the run shall end.

        A vCPU is paused when somebody touches it, and goes on behind that.
        """
        self.vm.asked = False
        is_over = self.vm.between()
        if not is_over:
            for index in indices:
                self._let_run(index)
        return is_over

    def _take(self, index: int) -> Came | None:
        """What a vCPU brought; None when another state was put there since, or somebody took it."""
        waiting = self.vm.vcpus[index].waiting
        if waiting.posted is None:
            return None
        if index in self.lanes:
            # It is about to park, and must have before it can be told to go on.
            self.lanes[index].pause()
        return waiting.take_posted()

    def pause(self, vcpu: KvmVcpu) -> bool:
        """Bring one vCPU out of the guest because somebody wants to touch it.

        Returns False for one that has no lane.
        """
        lane = self.lanes.get(vcpu.index)
        if lane is None:
            return False
        with self.vm.shield.held():
            lane.pause()
        return True

    def end(self) -> None:
        """Stop all; what came in and was not taken is taken by the next run."""
        with self.vm.shield.held():
            for lane in self.lanes.values():
                lane.ask_to_pause()
            for lane in self.lanes.values():
                lane.end()
            self.lanes.clear()
