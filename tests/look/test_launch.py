"""How far a launch is: pages, digest, states on the way, and what was refused."""

from __future__ import annotations

import pytest

from labkit.look.launch import LaunchProgress, LaunchStep
from labkit.sev.commands import GuestState
from labkit.sev.policy import Status
from labkit.sev.snp import SnpState

UPDATE = LaunchStep("LAUNCH_UPDATE_DATA", "DATA", 0x1000, 5000, digest=bytes(47) + b"\1")
VMSA = LaunchStep("LAUNCH_UPDATE_VMSA", "VMSA", 0, 4096, digest=b"\xab" * 48)
REFUSED = LaunchStep(
    "LAUNCH_FINISH", refused=Status.INVALID_GUEST_STATE, found="a guest in LAUNCH_UPDATE"
)
REFUSED_BY_KVM = LaunchStep("LAUNCH_UPDATE_VMSA", found="ENOTTY")


def launch(*steps: LaunchStep, **facts: object) -> LaunchProgress:
    """A launch after these steps."""
    return LaunchProgress("SEV-ES", GuestState.LAUNCH_UPDATE, steps, **facts)  # type: ignore[arg-type]


def test_that_a_page_begun_is_measured_whole() -> None:
    assert launch(UPDATE, VMSA).nr_pages == 2 + 1


def test_that_the_digest_is_the_last_one_known() -> None:
    assert launch(UPDATE, VMSA, REFUSED).digest == VMSA.digest
    assert launch().digest == b""


def test_that_vmsas_are_planned_with_the_pages() -> None:
    assert launch(UPDATE, VMSA, planned=((0x1000, 2), (0x8000, 5))).nr_planned == 2 + 5 + 1
    assert launch(UPDATE, VMSA).nr_planned == 0


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "LAUNCH_UPDATE: 3 pages measured, digest abababab…."),
        ({"planned": ((0, 2),)}, "LAUNCH_UPDATE: 3 of 3 pages measured, digest abababab…."),
        ({"expected": VMSA.digest}, ", as the owner computed."),
        ({"expected": bytes(48)}, ", not what the owner computed."),
    ],
)
def test_that_the_status_says_how_far_it_is(facts: dict[str, object], says: str) -> None:
    assert launch(UPDATE, VMSA, **facts).status.endswith(says)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (REFUSED, "LAUNCH_FINISH was refused: INVALID_GUEST_STATE (0x02), "),
        (REFUSED_BY_KVM, "LAUNCH_UPDATE_VMSA was refused by KVM: ENOTTY."),
    ],
)
def test_that_the_status_says_who_refused_the_last_command(step: LaunchStep, says: str) -> None:
    assert launch(UPDATE, step).status.startswith(says)
    assert "refused" not in launch(step, UPDATE).status


@pytest.mark.parametrize("state", [*GuestState, *SnpState], ids=lambda state: state.name)
def test_that_every_state_is_on_its_own_path(state: GuestState | SnpState) -> None:
    path = LaunchProgress("SEV", state, ()).path
    assert state.name in path and len(set(path)) == len(path)
