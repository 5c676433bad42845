/* SPDX-License-Identifier: MIT */
/* riscv64/exit.c: how a riscv64 guest leaves for its host, and where its exceptions go. */
#include "labkit.h"

vm_vaddr_t exception_handlers;

noinline void ucall_arch_do_ucall(vm_vaddr_t uc)
{
	sbi_ecall(KVM_RISCV_SELFTESTS_SBI_EXT, KVM_RISCV_SELFTESTS_SBI_UCALL, uc, 0, 0, 0, 0, 0);
}

/* Every trap comes here from handlers.S: the host's table first, then the host itself. */
void route_exception(struct ex_regs *regs)
{
	exception_handler_fn *table = (exception_handler_fn *)exception_handlers;
	bool irq = regs->cause & CAUSE_IRQ_FLAG;
	int index = irq ? NR_EXCEPTIONS : regs->cause & (NR_EXCEPTIONS - 1);

	if (table && table[index])
		table[index](regs);
	else
		ucall_unhandled(index, csr_read(stval), regs->epc, csr_read(stval));
}
