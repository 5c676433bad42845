/* SPDX-License-Identifier: MIT */
/* s390x/processor.h: the processor's own instructions as functions, and what an exception handler gets to see. */
#ifndef LABKIT_S390X_PROCESSOR_H
#define LABKIT_S390X_PROCESSOR_H

enum { PGM_OPERATION = 0x01, PGM_PRIVILEGED = 0x02, PGM_PROTECTION = 0x04, PGM_ADDRESSING = 0x05, PGM_SPECIFICATION = 0x06,
       PGM_FIXPT_DIVIDE = 0x09, PGM_SEGMENT_TRANSLATION = 0x10, PGM_PAGE_TRANSLATION = 0x11 };

#define NR_EXCEPTIONS 128
#define LC_PGM_ILC 0x88 /* doublewords of the lowcore: the code is the lowest halfword of this one */
#define LC_TEID 0xa8

struct ex_regs {
	uint64_t psw_mask, psw_addr;
	uint64_t gprs[16];
};

typedef void (*exception_handler_t)(struct ex_regs *regs);
extern vm_vaddr_t exception_handlers; /* table of NR_EXCEPTIONS handlers, made by the host; 0: none */
extern char pgm_check_handler[];
void route_exception(struct ex_regs *regs);

/* A doubleword by its real address, prefix applied. */
static inline uint64_t load_real(uint64_t real)
{
	uint64_t value;

	__asm__ volatile("lurag %0, %1" : "=d"(value) : "a"(real) : "memory");
	return value;
}

static inline void cpu_relax(void) { barrier(); }

#endif
