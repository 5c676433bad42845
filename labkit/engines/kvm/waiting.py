"""What waits in a vCPU's run page: an instruction half done, and exits that nobody took yet.

KVM leaves in the middle of an instruction: "the corresponding operations are complete (and guest
state is consistent) only after userspace has re-entered the kernel with KVM_RUN"
(Documentation/virt/kvm/api.rst, KVM_EXIT_IO and KVM_EXIT_MMIO). Until then a value that the host
owes lies in the run page. How far the instruction is has one name at a time, the `stage`:

    stage    came with                  registers         `complete` changes  ends with
    Resting  any other exit             behind it         nothing             -
    Out      OUT, OUTS                  before or behind  nothing             settling, next run
    In       IN, INS                    before it         the run page        settling, next run
    Store    a store to a hole          behind it         nothing             settling, next run
    Load     a load from a hole         before it         the run page        next run
    Taken    an In that was settled     behind it         RAX; INS: memory    next run
    Again    a Load that was restored   before it         the answer kept     the load leaves again

Settling (KvmVcpu.settle) enters the guest with immediate_exit set: KVM ends the instruction and
comes back before the next one. It is put off until somebody looks at registers, as most exits are
answered without. A Load cannot be settled, as KVM would take the value that the host has not given
yet. What such an instruction has loaded before that KVM keeps to itself, so a restored one begins
again, and the answers that it had are known.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from labkit.engines import exits
from labkit.engines.exits import Exit
from labkit.engines.kvm.page import RunPage

__all__ = [
    "AT_PORT",
    "RESTING",
    "Again",
    "Answer",
    "Came",
    "In",
    "Load",
    "Out",
    "Resting",
    "Stage",
    "Store",
    "Taken",
    "Waiting",
]

Came = Exit | BaseException  # what a vCPU that runs on a thread of its own brings


class Answer(NamedTuple):
    """What a load from a hole was given."""

    gpa: int
    size: int  # bytes
    value: int


class Resting(NamedTuple):
    """No instruction is under way, and the host owes no value."""


class Out(NamedTuple):
    """The host has what an OUT wrote; whether the guest is behind it differs from KVM to KVM."""


class In(NamedTuple):
    """The guest stands at an IN, whose value lies in the run page: 0 until the host gives one."""

    at: int  # place in the run page
    size: int  # bytes
    read_ahead: bool  # KVM has more elements of a REP INS there, for which nobody was asked


class Store(NamedTuple):
    """The host has what was stored; the instruction may have parts that have still to leave."""


class Load(NamedTuple):
    """The guest stands at a load from a hole, whose value lies in the run page: 0 until given."""

    gpa: int
    at: int  # place in the run page
    size: int  # bytes
    later: tuple[Answer, ...] = ()  # to loads of the same instruction, known from a snapshot


class Taken(NamedTuple):
    """The guest is behind an IN; until it runs on, its value can be changed where it lies now."""

    size: int  # bytes
    gva: int | None  # of INS, where in memory; None: in RAX


class Again(NamedTuple):
    """The guest will begin an instruction again; of its first loads the answers are known."""

    answers: tuple[Answer, ...]  # at least one


Stage = Resting | Out | In | Store | Load | Taken | Again
RESTING, OUT, STORE = Resting(), Out(), Store()
AT_PORT = (Out, In)
SETTLED_BY_ENTRY = (Out, In, Store)
VALUE_IN_PAGE = (In, Load)
_in_stage = cache(In)  # most ucalls need one, and always the same


class Waiting:
    """The stage of one vCPU's instruction, and the exits that wait.

    Each method is a transition, or says what is.
    """

    def __init__(self, page: RunPage) -> None:
        self.page = page
        self.stage: Stage = RESTING
        # Exits that came in one with another, or while an instruction was settled; the next first.
        self.exits: list[Exit] = []
        # What the vCPU's own thread brought and nobody took; an exit is the first of `exits` too,
        # as a part of the state.
        self.posted: Came | None = None
        # The last step was an iteration of a REP instruction that has more of them.
        self.inside_rep = False
        # To loads that the present instruction has done before this one.
        self._answers: list[Answer] = []
        # Registers and gpas of the accesses to holes since another instruction was seen.
        self._registers = b""
        self._gpas: list[int] = []

    # --- what is

    def has_read_ahead(self) -> bool:
        """Whether KVM would go on with elements of a REP INS for which nobody was asked."""
        return isinstance(self.stage, In) and self.stage.read_ahead

    def can_settle(self) -> bool:
        """Whether an entry ends the instruction without a value that the host has still to give."""
        return isinstance(self.stage, SETTLED_BY_ENTRY)

    # --- an exit leaves something

    def port_written(self, more: Iterable[Exit]) -> None:
        """An OUT has left; `more` are further elements that left with it."""
        self.stage = OUT
        self.exits += more

    def port_read(self, at: int, size: int, count: int) -> None:
        """An IN has left; KVM takes `count` elements of `size` bytes from a place in the page."""
        self.page.u8[at : at + size * count] = bytes(size * count)
        self.stage = _in_stage(at, size, count > 1)

    def stored(self, gpa: int) -> bool:
        """A store to a hole has left; returns whether it is the first part of its instruction.

        An access of more than 8 bytes, or across pages, leaves in parts, when the instruction
        itself is over already.
        """
        self.stage = STORE
        self._answers.clear()  # its loads are over
        return self._is_new(gpa)

    def loads(self, gpa: int, at: int, size: int) -> bool:
        """A load from a hole has left; returns whether its answer is known: nobody need be asked.

        KVM takes it from that place in the run page, where there is room for 8 bytes.
        """
        if self._is_new(gpa):
            self._answers.clear()

        stage = self.stage
        if isinstance(stage, Again) and stage.answers[0].gpa == gpa:
            known, *later = stage.answers
            self.page.put_value(at, 8, known.value)
            self.stage = Load(gpa, at, size, tuple(later))
            return True

        self.page.put_value(at, 8, 0)
        self.stage = Load(gpa, at, size)
        return False

    def _is_new(self, gpa: int) -> bool:
        """Whether an access to a hole is of another instruction or iteration than the one before.

        Parts of one instruction leave with the same registers, and each for a gpa of its own.
        """
        registers = self.page.gprs.tobytes()
        is_new = registers != self._registers or gpa in self._gpas
        if is_new:
            self._registers = registers
            self._gpas.clear()
        self._gpas.append(gpa)
        return is_new

    # --- the guest goes on

    def go_on(self) -> None:
        """The guest is entered: KVM completes what was under way with what the run page holds."""
        stage = self.stage
        if stage is RESTING:
            return
        if isinstance(stage, Load):
            self._answers.append(self._answer(stage))
            self.stage = Again(stage.later) if stage.later else RESTING
        elif not isinstance(stage, Again):
            self.stage = RESTING

    def _answer(self, load: Load) -> Answer:
        return Answer(load.gpa, load.size, self.page.value(load.at, load.size))

    def insn_over(self) -> None:
        """An instruction was seen to end: the next access to a hole is another's."""
        self._answers.clear()
        self._registers = b""

    def settled_in(self, size: int, gva: int | None) -> None:
        """An IN was settled: its value lies at gva, or in RAX, unless more of it waits by now."""
        if self.stage is RESTING:
            self.stage = Taken(size, gva)

    def complete(self, value: int) -> bool:
        """Give the value that the instruction under way reads; False when it waits for none."""
        stage = self.stage
        if isinstance(stage, VALUE_IN_PAGE):
            self.page.put_value(stage.at, stage.size, value)
            return True
        if isinstance(stage, Again):
            *before, last = stage.answers
            last = last._replace(value=value & (1 << 8 * last.size) - 1)
            self.stage = Again((*before, last))
            return True
        return False

    # --- exits that nobody took yet

    def take(self) -> Exit:
        """The next exit, for somebody who runs the vCPU; there must be one."""
        self.posted = None
        return self.exits.pop(0)

    def post(self, came: Came) -> None:
        """The vCPU's own thread came back with this."""
        if isinstance(came, Exit):
            self.exits.insert(0, came)
        self.posted = came

    def take_posted(self) -> Came | None:
        """What was posted; None when it was taken, or another state was put here since."""
        came = self.posted
        self.posted = None
        if isinstance(came, Exit):
            del self.exits[0]
        return came

    # --- as a part of the CPU's state

    def forget(self) -> None:
        """Nothing waits any more."""
        self.stage = RESTING
        self.exits.clear()
        self.posted = None
        self.insn_over()

    def save(self) -> dict[str, Any]:
        """What a snapshot keeps, for JSON; the stage must be one that cannot be settled."""
        answers: tuple[Answer, ...] = ()
        taken = None
        match self.stage:
            case Load(later=later) as load:
                answers = (*self._answers, self._answer(load), *later)
            case Again(known):
                answers = known
            case Taken(size, gva):
                taken = (size, gva)
        return {
            "answers": answers,
            "taken": taken,
            "exits": [_exit_as_text(exit) for exit in self.exits],
        }

    def restore(self, facts: dict[str, Any]) -> None:
        """Put it back, where nothing waits."""
        if facts["answers"]:
            self.stage = Again(tuple(Answer(*answer) for answer in facts["answers"]))
        elif facts["taken"]:
            self.stage = Taken(*facts["taken"])
        self.exits[:] = (_exit_from_text(*text) for text in facts["exits"])


def _exit_as_text(exit: Exit) -> tuple[str, str]:
    """The name of its class, and the values of its fields as Python writes them."""
    return type(exit).__name__, repr(tuple(vars(exit).values()))


def _exit_from_text(name: str, values: str) -> Exit:
    made: Exit = getattr(exits, name)(*literal_eval(values))
    return made
