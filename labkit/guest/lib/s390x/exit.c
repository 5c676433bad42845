/* SPDX-License-Identifier: MIT */
/* s390x/exit.c: how an s390x guest leaves for its host, and where its program interruptions go. */
#include "labkit.h"

vm_vaddr_t exception_handlers;

noinline void ucall_arch_do_ucall(vm_vaddr_t uc)
{
	__asm__ volatile("diag 0,%0,0x501" : : "a"(uc) : "memory");
}

/* Every program interruption comes here from handlers.S: the host's table first, then the host itself. */
void route_exception(struct ex_regs *regs)
{
	exception_handler_t *table = (exception_handler_t *)exception_handlers;
	uint64_t code = load_real(LC_PGM_ILC) & (NR_EXCEPTIONS - 1), teid = load_real(LC_TEID);

	if (table && table[code])
		table[code](regs);
	else
		ucall_unhandled(code, teid, regs->psw_addr, teid & PAGE_MASK);
}
