"""`python -m labkit.cli` is `labkit`."""

import sys

from labkit.cli import main

__all__: list[str] = []

sys.exit(main())
