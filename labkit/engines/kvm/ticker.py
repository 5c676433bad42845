"""The one thread that looks up now and then, and kicks a run that lasts out of the guest.

KVM_RUN comes back to Python only with an exit or a signal. A vCPU that is in the guest at two ticks
in a row is kicked (Documentation/virt/kvm/api.rst, immediate_exit); its own thread then checks
deadline, Ctrl-C and pauses, and goes on. So nothing that is asked of a run waits longer than two
ticks, and no run can freeze the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import Protocol
from weakref import WeakSet

__all__ = ["KICK", "TICKER", "Kicked", "Ticker", "handle_kicks", "send_kick"]

TICK = 0.04  # seconds
IDLE = 25  # ticks without any run after which the thread ends
KICK = signal.SIGRTMIN + 7
_LIBC = ctypes.CDLL(None, use_errno=True)


class Kicked(Protocol):
    """A vCPU as the ticker sees it."""

    entered: int  # a number of its own for every stay in the guest, 0 outside

    def kick(self) -> None: ...


def handle_kicks() -> None:
    """Give the signal a handler that does nothing, in C; without one a kick ends the process.

    Python's own would run on the main thread and need it to be free. abs() does nothing that lasts.
    """
    _LIBC.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    _LIBC.signal.restype = ctypes.c_void_p
    _LIBC.signal(KICK, ctypes.cast(_LIBC.abs, ctypes.c_void_p))


def send_kick(tid: int) -> None:
    """Interrupt the system call that a thread of this process is in, if there is such a thread."""
    _LIBC.tgkill(os.getpid(), tid, int(KICK))


class Ticker:
    """Watches every open vCPU of the process; its thread exists only while something runs."""

    def __init__(self) -> None:
        self.vcpus: WeakSet[Kicked] = WeakSet()
        self.alive = 0  # the process in which the thread is: a fork leaves it behind
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to tick, unless somebody did already."""
        with self._lock:
            if self.alive == os.getpid():
                return
            self.alive = os.getpid()
            threading.Thread(target=self._tick, name="labkit-kvm-ticker", daemon=True).start()

    def _tick(self) -> None:
        seen: set[int] = set()
        idle = 0
        while True:
            time.sleep(TICK)
            seen = self._look(seen)
            idle = 0 if seen else idle + 1
            if idle > IDLE or not len(self.vcpus):
                self.alive = 0
                # Somebody who entered just before saw a ticker, and relies on it.
                if not any(vcpu.entered for vcpu in list(self.vcpus)):
                    return
                self.alive = os.getpid()
                idle = 0

    def _look(self, seen: set[int]) -> set[int]:
        """Kick the stays that were on a tick ago, and return those that are on now.

        No vCPU is held on to between ticks.
        """
        vcpus = list(self.vcpus)
        now = {vcpu.entered for vcpu in vcpus} - {0}
        for vcpu in vcpus:
            if vcpu.entered in seen:
                vcpu.kick()
        return now


TICKER = Ticker()
