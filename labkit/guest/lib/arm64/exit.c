/* SPDX-License-Identifier: MIT */
/* arm64/exit.c: how an arm64 guest leaves for its host, and where its exceptions go. */
#include "labkit.h"

vm_vaddr_t *ucall_exit_mmio_addr; /* a page that no memslot is behind; the host says where, each VM has its own */
vm_vaddr_t exception_handlers;

noinline void ucall_arch_do_ucall(vm_vaddr_t uc)
{
	WRITE_ONCE(*ucall_exit_mmio_addr, uc);
}

/* Every exception comes here from handlers.S: the host's table first, then the host itself. */
void route_exception(struct ex_regs *regs, int vector)
{
	handler_fn *table = (handler_fn *)exception_handlers;
	uint64_t esr = read_sysreg(esr_el1);
	int ec = vector % 4 ? 0 : esr >> ESR_EC_SHIFT & (ESR_EC_NUM - 1); /* only a synchronous one has a class */
	int index = vector * ESR_EC_NUM + ec;

	if (table && table[index])
		table[index](regs);
	else
		ucall_unhandled(index, esr, regs->pc, read_sysreg(far_el1));
}
