"""The device /dev/kvm: opened, and asked whether it is one that labkit can use."""

from __future__ import annotations

import os

from labkit.engines.kvm.abi import CAPS, CONSTANTS, IOCTLS, enter
from labkit.errors import NotAvailable

__all__ = ["open_device"]

NEEDED = (
    "USER_MEMORY",
    "SYNC_REGS",
    "IMMEDIATE_EXIT",
    "SET_GUEST_DEBUG",
    "VCPU_EVENTS",
    "DEBUGREGS",
    "XSAVE",
    "XCRS",
)
API_VERSION = CONSTANTS["KVM_API_VERSION"]
_lacks: dict[str, str] = {}  # path of a KVM -> what it lacks, "" for nothing


def open_device(path: str) -> int:
    """A file descriptor of KVM; raises NotAvailable with what to do where there is none."""
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotAvailable(
            f"there is no {path}: load kvm_intel, kvm_amd or kvm_pvm, or give the container the "
            f"device (--device {path}); the default engine needs none of this",
            backend="kvm",
        ) from None
    except OSError as err:
        advice = ""
        if isinstance(err, PermissionError):
            advice = ": add yourself to the group kvm (usermod -aG kvm USER), log in again"
        raise NotAvailable(f"{path}: {err.strerror}{advice}", backend="kvm") from err

    what_is_wrong = _wrong_with(device, path)
    if what_is_wrong:
        os.close(device)
        raise NotAvailable(
            f"{path} {what_is_wrong}: labkit needs KVM's API version {API_VERSION} with "
            f"{', '.join(NEEDED)}, which Linux has had since 4.19",
            backend="kvm",
        )
    return device


def _wrong_with(device: int, path: str) -> str:
    """What makes this KVM unusable, "" when nothing does; asked once in a process."""
    if path not in _lacks:
        try:
            version = enter(device, IOCTLS["KVM_GET_API_VERSION"], 0)
            missing = [name for name in NEEDED if not _has(device, name)]
        except OSError as err:
            return f"is no KVM ({err.strerror})"
        if version != API_VERSION:
            return f"has API version {version}"
        _lacks[path] = f"lacks {', '.join(missing)}" if missing else ""
    return _lacks[path]


def _has(device: int, name: str) -> bool:
    return bool(enter(device, IOCTLS["KVM_CHECK_EXTENSION"], CAPS[f"KVM_CAP_{name}"]))
