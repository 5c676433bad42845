"""The default engine: Unicorn, embedded, made exact where Unicorn is not."""

from __future__ import annotations

from labkit.engines.unicorn.vm import UnicornVm

__all__ = ["UnicornVm"]
