/* SPDX-License-Identifier: MIT */
/* x86_64/exit.c: how an x86-64 guest leaves for its host, and where its exceptions go. */
#include "labkit.h"

vm_vaddr_t exception_handlers;

/* The host reads RDI when the IN stops at the agreed port. Nothing else is promised to survive, so nothing else is relied on. */
noinline void ucall_arch_do_ucall(vm_vaddr_t uc)
{
	uint8_t ignored;

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
