"""A machine: memory, page tables and vCPUs on some engine. It knows no ucall, no encryption and no view."""
