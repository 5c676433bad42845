/* SPDX-License-Identifier: MIT */
/* arm64/processor.h: the processor's own instructions as functions, and what an exception handler gets to see. */
#ifndef LABKIT_ARM64_PROCESSOR_H
#define LABKIT_ARM64_PROCESSOR_H

enum { VECTOR_SYNC_CURRENT_SP0, VECTOR_IRQ_CURRENT_SP0, VECTOR_FIQ_CURRENT_SP0, VECTOR_ERROR_CURRENT_SP0,
       VECTOR_SYNC_CURRENT, VECTOR_IRQ_CURRENT, VECTOR_FIQ_CURRENT, VECTOR_ERROR_CURRENT,
       VECTOR_SYNC_LOWER_64, VECTOR_IRQ_LOWER_64, VECTOR_FIQ_LOWER_64, VECTOR_ERROR_LOWER_64, VECTOR_NUM = 16 };

#define ESR_EC_NUM 64
#define ESR_EC_SHIFT 26
#define ESR_EC_SVC 0x15
#define ESR_EC_IABT 0x21
#define ESR_EC_DABT 0x25
#define ESR_EC_BRK_INS 0x3c

struct ex_regs {
	uint64_t regs[31];
	uint64_t sp, pc, pstate;
};

typedef void (*handler_fn)(struct ex_regs *regs);
typedef handler_fn exception_handler_t;
extern vm_vaddr_t exception_handlers; /* handler_fn[VECTOR_NUM][ESR_EC_NUM], made by the host; 0: none */
extern char vectors[];
void route_exception(struct ex_regs *regs, int vector);

#define read_sysreg(reg) ({ uint64_t value_; __asm__ volatile("mrs %0, " #reg : "=r"(value_) : : "memory"); value_; })
#define write_sysreg(value, reg) __asm__ volatile("msr " #reg ", %0" : : "r"((uint64_t)(value)) : "memory")

#define isb() __asm__ volatile("isb" : : : "memory")
#define dsb(scope) __asm__ volatile("dsb " #scope : : : "memory")
static inline void cpu_relax(void) { __asm__ volatile("yield" : : : "memory"); }

#endif
