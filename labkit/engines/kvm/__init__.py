"""Real vCPUs through /dev/kvm: ioctl, mmap and ctypes structures, and nothing else."""

from labkit.engines.kvm.vm import KvmVm

__all__ = ["KvmVm"]
