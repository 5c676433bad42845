"""AMD SEV as a model: memory cipher, secure processor, KVM's rules, SNP's page table, VMSA and GHCB; no engine, no view."""

from __future__ import annotations

__all__ = ["SIMPLIFIED"]

# What the model leaves out, and why; each file's docstring says the same about its own part
SIMPLIFIED = (
    ("tweak constants", "real ones differ per part and are secret; these are labkit's own, the algebra is the published one"),
    ("certificates", "nobody signs for a Diffie-Hellman key, so a DOMAIN policy cannot be proven and forbids SEND"),
    ("attestation reports and ID blocks", "they need AMD's signing keys; the launch digest and the measurement are real"),
    ("WBINVD", "the model has no caches: one DF_FLUSH stands for what hardware needs WBINVD on every core for"),
    ("VMPLs and huge RMP pages", "labkit's guests run at VMPL0 on 4 KiB pages, so there is no RMPADJUST and no PSMASH"),
    ("the CPUID page", "SNP's firmware compares it with the CPU; the model checks its count only"),
)
