/* SPDX-License-Identifier: MIT */
/* riscv64/processor.h: the processor's own instructions as functions, and what an exception handler gets to see. */
#ifndef LABKIT_RISCV64_PROCESSOR_H
#define LABKIT_RISCV64_PROCESSOR_H

#define KVM_RISCV_SELFTESTS_SBI_EXT 0x08FFFFFF
#define KVM_RISCV_SELFTESTS_SBI_UCALL 0
#define KVM_RISCV_SELFTESTS_SBI_UNEXP 1

#define NR_VECTORS 2
#define NR_EXCEPTIONS 32
#define CAUSE_IRQ_FLAG (1UL << 63)

enum { EXC_INST_MISALIGNED, EXC_INST_ACCESS, EXC_INST_ILLEGAL, EXC_BREAKPOINT, EXC_LOAD_MISALIGNED, EXC_LOAD_ACCESS,
       EXC_STORE_MISALIGNED, EXC_STORE_ACCESS, EXC_SYSCALL, EXC_INST_PAGE_FAULT = 12, EXC_LOAD_PAGE_FAULT, EXC_STORE_PAGE_FAULT = 15 };

struct ex_regs {
	unsigned long ra, sp, gp, tp, t0, t1, t2, s0, s1;
	unsigned long a0, a1, a2, a3, a4, a5, a6, a7;
	unsigned long s2, s3, s4, s5, s6, s7, s8, s9, s10, s11;
	unsigned long t3, t4, t5, t6;
	unsigned long epc, status, cause;
};

typedef void (*exception_handler_fn)(struct ex_regs *regs);
typedef exception_handler_fn exception_handler_t;
extern vm_vaddr_t exception_handlers; /* exception_handler_fn[NR_VECTORS][NR_EXCEPTIONS], made by the host; 0: none */
extern char exception_vectors[];
void route_exception(struct ex_regs *regs);

#define csr_read(csr) ({ unsigned long value_; __asm__ volatile("csrr %0, " #csr : "=r"(value_) : : "memory"); value_; })
#define csr_write(csr, value) __asm__ volatile("csrw " #csr ", %0" : : "r"((unsigned long)(value)) : "memory")

struct sbiret {
	long error, value;
};

static inline struct sbiret sbi_ecall(int ext, int fid, unsigned long arg0, unsigned long arg1, unsigned long arg2,
				      unsigned long arg3, unsigned long arg4, unsigned long arg5)
{
	register unsigned long a0 __asm__("a0") = arg0, a1 __asm__("a1") = arg1, a2 __asm__("a2") = arg2;
	register unsigned long a3 __asm__("a3") = arg3, a4 __asm__("a4") = arg4, a5 __asm__("a5") = arg5;
	register unsigned long a6 __asm__("a6") = fid, a7 __asm__("a7") = ext;

	__asm__ volatile("ecall" : "+r"(a0), "+r"(a1) : "r"(a2), "r"(a3), "r"(a4), "r"(a5), "r"(a6), "r"(a7) : "memory");
	return (struct sbiret){ a0, a1 };
}

static inline void cpu_relax(void) { __asm__ volatile("nop" : : : "memory"); }

#endif
