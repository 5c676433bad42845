"""A machine: memory, page tables and vCPUs on some engine."""
