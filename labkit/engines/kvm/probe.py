"""The capabilities of this machine's KVM: what it was seen to do, in words; once in a process."""

from __future__ import annotations

from functools import cache

from labkit.engines.base import Capability
from labkit.engines.kvm import trials
from labkit.engines.kvm.trials import KERNEL, USER

__all__ = ["probe"]

NATIVE = 50e-9  # seconds an instruction; emulation takes twenty times that

# What no KVM does otherwise
ALWAYS = (
    Capability(
        "count",
        False,
        "nobody counts a run without max_insns: the clock moves by one with each exit, "
        "`exact` is False",
    ),
    Capability(
        "pool_history",
        False,
        "in a run without max_insns nobody tells of locked instructions: a slot of the pool is "
        "taken `since` its ucall, and `uses` counts what the host saw",
    ),
    Capability(
        "deterministic",
        False,
        "real time; but runs with max_insns or a schedule with a quantum are stepped, and repeat",
    ),
    Capability("parallel_vcpus", True, 'schedule="parallel": a thread and a real CPU each'),
    Capability(
        "exceptions",
        False,
        "KVM brings an exception to its handler inside the guest and tells nobody",
    ),
    Capability(
        "triple_fault_vectors",
        False,
        "KVM_EXIT_SHUTDOWN does not say which exceptions led there",
    ),
    Capability("protect", False, "labkit encrypts guests of its default engine only"),
    Capability(
        "hypercalls",
        False,
        "KVM answers VMCALL and VMMCALL itself, with -KVM_ENOSYS (kvm_pvm at CPL0 never ends them)",
    ),
)


@cache
def probe() -> tuple[Capability, ...]:
    """The capabilities of this machine's KVM, with what was seen."""
    step, step_user = trials.steps(KERNEL), trials.steps(USER)
    return (
        *_debugging(step, step_user),
        *_speed(step_user),
        *_time_and_traps(),
        *_instructions(),
        *_cpu(),
        *_memory(),
        *ALWAYS,
    )


def _seen(name: str, have: bool, if_so: str, if_not: str) -> Capability:
    """A capability with the reason that fits."""
    return Capability(name, have, if_so if have else if_not)


def _debugging(step: bool, step_user: bool) -> tuple[Capability, ...]:
    return (
        _seen(
            "step",
            step,
            "at CPL0: one instruction, one REP iteration, one exception delivery; a guest that "
            "steps itself (TF) does so only while it is not stepped",
            "KVM_GUESTDBG_SINGLESTEP does not stop behind one instruction here",
        ),
        _seen(
            "step_user",
            step_user,
            "at CPL3 too",
            "at CPL3 a step's trap goes to the guest's own #DB handler here, and a step that leads "
            "there (IRET, SYSRET) runs on: a VM that must step, count or break needs "
            'privilege="kernel"',
        ),
        _seen(
            "breakpoints",
            step and trials.breaks(KERNEL),
            "any number: 4 in debug registers, more by stepping",
            "a debug register on an instruction does not stop there here",
        ),
        _seen(
            "watchpoints",
            trials.watches(KERNEL),
            "debug registers on data",
            "a debug register on data does not stop a store here",
        ),
    )


def _speed(step_user: bool) -> tuple[Capability, ...]:
    kernel, user = trials.pace(KERNEL), trials.pace(USER)
    told = f"{kernel * 1e9:.0f} ns an instruction at CPL0, {user * 1e9:.0f} ns at CPL3"
    only_user_is_fast = kernel > NATIVE >= user
    by_default = only_user_is_fast and step_user

    if by_default:
        why = f"ring 0 is emulated here ({told}), and steps are exact in both rings"
    elif only_user_is_fast:
        why = (
            f"ring 0 is emulated here ({told}), but only there a step is one instruction: say "
            'privilege="user" for speed'
        )
    else:
        why = f"ring 0 is as fast as it gets here ({told})"
    return (
        Capability("native_speed", kernel <= NATIVE, told),
        Capability("native_speed_user", user <= NATIVE, told),
        Capability("user_by_default", by_default, why),
    )


def _time_and_traps() -> tuple[Capability, ...]:
    lost = _lost_interrupts()
    return (
        _seen(
            "tsc",
            trials.keeps_time(KERNEL),
            "a guest's TSC can be set and moved",
            "here a guest's TSC is the host's: KVM takes IA32_TSC and KVM_VCPU_TSC_OFFSET without "
            "an error, and nothing changes; nor does CR4.TSD",
        ),
        _seen(
            "software_interrupts",
            not lost,
            "INT1, INT3 and INT n, from both rings",
            "here these do not reach their handler, or not with the address behind them: "
            f"{', '.join(lost)}",
        ),
        _seen(
            "nested_faults",
            trials.nests(KERNEL),
            "a fault on the way to a handler is what the manual says",
            "here what is wrong with a gate, its segment or its stack on the way to a handler "
            "becomes #DF, or is not looked at",
        ),
    )


def _lost_interrupts() -> list[str]:
    """Software interrupts that do not reach their handlers, and from where."""
    lost = []
    for name, trap in trials.TRAPS.items():
        if not trap(KERNEL):
            lost.append(f"{name} at CPL0")
        if not trap(USER):
            lost.append(f"{name} at CPL3")
    return lost


def _instructions() -> tuple[Capability, ...]:
    return (
        _seen(
            "simd",
            trials.runs_simd(KERNEL),
            "x87 and SSE in both rings",
            "at CPL0 this KVM emulates neither x87 nor most of SSE (nor XGETBV, RDTSCP, POPCNT, "
            "MONITOR): such an instruction is an internal error that names it; CPL3 "
            '(privilege="user") runs natively',
        ),
        _seen(
            "syscall",
            trials.calls(USER),
            "SYSCALL leads from CPL3 to CPL0",
            "here SYSCALL at CPL3 goes on at LSTAR, but at CPL3 and with the user's CS and SS",
        ),
        _seen(
            "iopl",
            trials.reaches_port(USER),
            "IOPL 3 lets CPL3 at every port",
            "here CPL3 reaches a port by the bitmap of its TSS alone, whatever IOPL says",
        ),
    )


def _cpu() -> tuple[Capability, ...]:
    huge_pages = trials.loads_from_gib(KERNEL) and trials.loads_from_gib(USER)
    own_at_kernel, own_at_user = trials.identifies(KERNEL), trials.identifies(USER)
    return (
        _seen(
            "huge_pages",
            huge_pages,
            "leaves of 2 MiB and 1 GiB",
            "2 MiB only: here a leaf of 1 GiB is a page fault for its reserved bits "
            "(KVM_GET_SUPPORTED_CPUID has no pdpe1gb): map its memory with smaller pages",
        ),
        Capability(
            "cpuid",
            own_at_kernel and own_at_user,
            f"leaf 7 of a guest is {_whose(own_at_kernel)} at CPL0 and {_whose(own_at_user)} "
            "at CPL3",
        ),
        Capability(
            "msr_table",
            False,
            "a guest finds all of KVM's MSRs; those that KVM lacks are the VM's own table's",
        ),
    )


def _whose(own: bool) -> str:
    return "the VM's" if own else "the host's"


def _memory() -> tuple[Capability, ...]:
    return (
        Capability(
            "snapshot",
            True,
            "registers, XSAVE, MSRs, memory bit for bit; the TSC goes on, from where it was if it "
            "can be set",
        ),
        Capability(
            "dirty_log",
            trials.logs(KERNEL),
            "KVM_MEM_LOG_DIRTY_PAGES: a restore writes back what was written",
        ),
    )
