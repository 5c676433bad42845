/* SPDX-License-Identifier: MIT */
/* x86_64/exit.c: how an x86-64 guest leaves for its host, and where its exceptions go. */
#include "labkit.h"

vm_vaddr_t exception_handlers;

/*
 * A guest with encrypted registers has no RDI to show: the value goes as an OUT's RAX through a page that both can read, the
 * vCPU's own GHCB (AMD 56421, 4.1.2). The host made the pages and the table of them; without one nothing is encrypted.
 */
struct ghcb_place { vm_vaddr_t gva; vm_paddr_t gpa; } *sev_ghcbs;

#define GHCB_FIELD(ghcb, offset) (*(volatile uint64_t *)((ghcb) + (offset)))
#define VMGEXIT() __asm__ volatile("rep; vmmcall" : : : "memory")

static noinline void ucall_through_ghcb(vm_vaddr_t uc)
{
	struct ghcb_place *place;
	uint32_t cpu;

	rdtscp(&cpu); /* TSC_AUX: the vCPU's number */
	place = &sev_ghcbs[cpu];
	if (rdmsr(MSR_AMD64_SEV_ES_GHCB) != place->gpa) {
		if (rdmsr(MSR_AMD64_SEV) & MSR_AMD64_SEV_SNP_ENABLED) {
			wrmsr(MSR_AMD64_SEV_ES_GHCB, place->gpa | GHCB_MSR_REG_GPA_REQ);
			VMGEXIT();
		}
		wrmsr(MSR_AMD64_SEV_ES_GHCB, place->gpa);
	}
	GHCB_FIELD(place->gva, 0x1f8) = uc; /* RAX */
	GHCB_FIELD(place->gva, 0x390) = SVM_EXIT_IOIO;
	GHCB_FIELD(place->gva, 0x398) = (uint64_t)UCALL_PIO_PORT << 16 | 1 << 6; /* OUT, 4 bytes */
	GHCB_FIELD(place->gva, 0x3a0) = 0;
	GHCB_FIELD(place->gva, 0x3f0) = BIT(0x1f8 / 8); /* what of the page is valid: a bit for every 8 bytes */
	GHCB_FIELD(place->gva, 0x3f8) = BIT(0x390 / 8 - 64) | BIT(0x398 / 8 - 64) | BIT(0x3a0 / 8 - 64);
	GHCB_FIELD(place->gva, 0xff8) = 2UL << 16; /* protocol version 2, usage 0 */
	VMGEXIT();
}

/* The host reads RDI when the IN stops at the agreed port. Nothing else is promised to survive, so nothing else is relied on. */
noinline void ucall_arch_do_ucall(vm_vaddr_t uc)
{
	uint8_t ignored;

	if (sev_ghcbs) {
		ucall_through_ghcb(uc);
		return;
	}
	__asm__ volatile("in %%dx, %%al" : "=a"(ignored) : "d"((uint16_t)UCALL_PIO_PORT), "D"(uc) : "memory");
}

/* Was the faulting instruction inside kvm_asm_safe()? Vector 0 cannot be told from success, so #DE is not offered there. */
static bool fixed_up(struct ex_regs *regs)
{
	if (regs->r9 != KVM_EXCEPTION_MAGIC || regs->r10 != regs->rip || regs->vector == DE_VECTOR)
		return false;
	regs->rip = regs->r11;
	regs->r9 = regs->vector;
	regs->r10 = regs->error_code;
	return true;
}

/* Every exception comes here from handlers.S: the host's table first, then kvm_asm_safe(), then the host itself. */
void route_exception(struct ex_regs *regs)
{
	exception_handler_t *table = (exception_handler_t *)exception_handlers;

	if (table && table[regs->vector])
		table[regs->vector](regs);
	else if (!fixed_up(regs))
		ucall_unhandled(regs->vector, regs->error_code, regs->rip, get_cr2());
}
