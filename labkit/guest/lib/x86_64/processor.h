/* SPDX-License-Identifier: MIT */
/* x86_64/processor.h: the processor's own instructions as functions, and what an exception handler gets to see. */
#ifndef LABKIT_X86_64_PROCESSOR_H
#define LABKIT_X86_64_PROCESSOR_H

#define UCALL_PIO_PORT 0x1000
#define NUM_INTERRUPTS 256

enum { DE_VECTOR, DB_VECTOR, NMI_VECTOR, BP_VECTOR, OF_VECTOR, BR_VECTOR, UD_VECTOR, NM_VECTOR, DF_VECTOR,
       TS_VECTOR = 10, NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR, MF_VECTOR = 16, AC_VECTOR, MC_VECTOR,
       XM_VECTOR, VE_VECTOR, CP_VECTOR, HV_VECTOR = 28, VC_VECTOR, SX_VECTOR };

/* --- exceptions --- */
struct ex_regs { /* as handlers.S and the processor push it, lowest address first */
	uint64_t rax, rcx, rdx, rbx, rbp, rsi, rdi;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t vector, error_code;
	uint64_t rip, cs, rflags, rsp, ss;
};

typedef void (*exception_handler_t)(struct ex_regs *regs);
extern vm_vaddr_t exception_handlers; /* table of NUM_INTERRUPTS handlers, made by the host; 0: none */
extern const vm_vaddr_t idt_handlers[NUM_INTERRUPTS];
void route_exception(struct ex_regs *regs);

/* --- model-specific registers, time, CPUID --- */
#define READ_EDX_EAX_(insn) \
	static inline uint64_t insn(uint32_t index) \
	{ \
		uint32_t low, high; \
		__asm__ volatile(#insn : "=a"(low), "=d"(high) : "c"(index) : "memory"); \
		return low | (uint64_t)high << 32; \
	}
READ_EDX_EAX_(rdmsr)
READ_EDX_EAX_(rdpmc)
READ_EDX_EAX_(xgetbv)
#undef READ_EDX_EAX_

static inline void wrmsr(uint32_t msr, uint64_t value)
{
	__asm__ volatile("wrmsr" : : "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(msr) : "memory");
}

static inline uint64_t rdtsc(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return low | (uint64_t)high << 32;
}

static inline uint64_t rdtscp(uint32_t *aux)
{
	uint32_t low, high;

	__asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(*aux));
	return low | (uint64_t)high << 32;
}

static inline void __cpuid(uint32_t function, uint32_t index, uint32_t *eax, uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
	__asm__ volatile("cpuid" : "=a"(*eax), "=b"(*ebx), "=c"(*ecx), "=d"(*edx) : "a"(function), "c"(index) : "memory");
}

static inline void cpuid(uint32_t function, uint32_t *eax, uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
	__cpuid(function, 0, eax, ebx, ecx, edx);
}

static inline void xsetbv(uint32_t index, uint64_t value)
{
	__asm__ volatile("xsetbv" : : "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(index) : "memory");
}

/* --- encrypted guests (names of the kernel's msr-index.h, sev-common.h and svm.h) --- */
#define MSR_AMD64_SEV_ES_GHCB 0xc0010130
#define MSR_AMD64_SEV 0xc0010131
#define MSR_AMD64_SEV_ENABLED BIT(0)
#define MSR_AMD64_SEV_ES_ENABLED BIT(1)
#define MSR_AMD64_SEV_SNP_ENABLED BIT(2)
#define GHCB_MSR_REG_GPA_REQ 0x012
#define SVM_EXIT_IOIO 0x07b

/* --- ports --- */
#define PORT_ACCESS_(letter, type) \
	static inline type in##letter(uint16_t port) \
	{ type value; __asm__ volatile("in %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; } \
	static inline void out##letter(uint16_t port, type value) \
	{ __asm__ volatile("out %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
PORT_ACCESS_(b, uint8_t)
PORT_ACCESS_(w, uint16_t)
PORT_ACCESS_(l, uint32_t)
#undef PORT_ACCESS_

/* --- registers --- */
#define READ_REGISTER_(name, type) \
	static inline type get_##name(void) { type value; __asm__ volatile("mov %%" #name ", %0" : "=r"(value) : : "memory"); return value; }
#define WRITE_REGISTER_(name) \
	static inline void set_##name(uint64_t value) { __asm__ volatile("mov %0, %%" #name : : "r"(value) : "memory"); }
READ_REGISTER_(cr0, uint64_t)
READ_REGISTER_(cr2, uint64_t)
READ_REGISTER_(cr3, uint64_t)
READ_REGISTER_(cr4, uint64_t)
READ_REGISTER_(cs, uint16_t)
READ_REGISTER_(ss, uint16_t)
READ_REGISTER_(ds, uint16_t)
READ_REGISTER_(es, uint16_t)
READ_REGISTER_(fs, uint16_t)
READ_REGISTER_(gs, uint16_t)
WRITE_REGISTER_(cr0)
WRITE_REGISTER_(cr3)
WRITE_REGISTER_(cr4)
#undef READ_REGISTER_
#undef WRITE_REGISTER_

static inline void cpu_relax(void) { __asm__ volatile("pause" : : : "memory"); }
static inline void cli(void) { __asm__ volatile("cli" : : : "memory"); }
static inline void sti(void) { __asm__ volatile("sti" : : : "memory"); }
static inline void hlt(void) { __asm__ volatile("hlt" : : : "memory"); }
static inline void invlpg(const void *gva) { __asm__ volatile("invlpg (%0)" : : "r"(gva) : "memory"); }

/* --- bitmaps: one locked instruction each --- */
#define LABKIT_OWN_BITMAPS
static __always_inline bool test_and_set_bit(unsigned long nr, volatile unsigned long *bitmap)
{
	bool was_set;

	__asm__ volatile("lock btsq %2, %1" : "=@ccc"(was_set), "+m"(*bitmap) : "r"(nr) : "memory");
	return was_set;
}

static __always_inline bool test_and_clear_bit(unsigned long nr, volatile unsigned long *bitmap)
{
	bool was_set;

	__asm__ volatile("lock btrq %2, %1" : "=@ccc"(was_set), "+m"(*bitmap) : "r"(nr) : "memory");
	return was_set;
}


/*
 * One instruction that may fault. Three registers carry the agreement with route_exception(): r9 a magic number,
 * r10 the only address that may fault, r11 where to go on. Behind it r9 is the vector (0: no fault), r10 the error code.
 */
#define KVM_EXCEPTION_MAGIC 0x74696b62616c
#define KVM_ASM_SAFE(insn) \
	"movabs $" __stringify(KVM_EXCEPTION_MAGIC) ", %%r9\n\t" \
	"lea 770f(%%rip), %%r10\n\t" \
	"lea 771f(%%rip), %%r11\n\t" \
	"770: " insn "\n\t" \
	"xor %%r9d, %%r9d\n\t" \
	"771: mov %%r9b, %[vector]\n\t" \
	"mov %%r10, %[error_code]\n\t"
#define KVM_ASM_SAFE_OUTPUTS(v, ec) [vector] "=qm"(v), [error_code] "=rm"(ec)
#define KVM_ASM_SAFE_CLOBBERS "r9", "r10", "r11", "memory"
#define kvm_asm_safe_ec(insn, error_code, inputs...) ({ \
	uint8_t vector_; \
	__asm__ volatile(KVM_ASM_SAFE(insn) : KVM_ASM_SAFE_OUTPUTS(vector_, error_code) : inputs : KVM_ASM_SAFE_CLOBBERS); \
	vector_; })
#define kvm_asm_safe(insn, inputs...) ({ uint64_t error_code_; kvm_asm_safe_ec(insn, error_code_, ##inputs); })

#define READ_SAFE_(insn) \
	static inline uint8_t insn##_safe(uint32_t index, uint64_t *value) \
	{ \
		uint64_t error_code; \
		uint32_t low, high; \
		uint8_t vector; \
		__asm__ volatile(KVM_ASM_SAFE(#insn) : "=a"(low), "=d"(high), KVM_ASM_SAFE_OUTPUTS(vector, error_code) \
				 : "c"(index) : KVM_ASM_SAFE_CLOBBERS); \
		*value = low | (uint64_t)high << 32; \
		return vector; \
	}
READ_SAFE_(rdmsr)
READ_SAFE_(rdpmc)
READ_SAFE_(xgetbv)
#undef READ_SAFE_

static inline uint8_t wrmsr_safe(uint32_t msr, uint64_t value)
{
	return kvm_asm_safe("wrmsr", "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(msr));
}

static inline uint8_t xsetbv_safe(uint32_t index, uint64_t value)
{
	return kvm_asm_safe("xsetbv", "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(index));
}

#endif
