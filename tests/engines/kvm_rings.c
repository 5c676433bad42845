// What KVM itself does where labkit's capability table says "no": plain C over the ioctls, nothing of labkit's.
// Prints a line for each case: its name, the exit reason, RIP, CS, and the RIP on the stack behind an exception.
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, GDT = 0x4000, TSS = 0x4100, IDT = 0x5000, CODE = 0x6000, HALT = 0x6800, SYSCALL = 0x6880, USER = 0x6900,
       STACK = 0x8000, RING0 = 0x9000, SIZE = 0xA000, MSR_STAR = 0xC0000081, MSR_LSTAR = 0xC0000082 };
#define OR_DIE(call) do { if ((call) < 0) { perror(#call); return 1; } } while (0)

static struct kvm_segment segment(int selector, int type, int dpl, int code)
{
	return (struct kvm_segment){ .limit = 0xFFFFFFFF, .selector = selector, .type = type, .present = 1, .dpl = dpl, .s = 1, .g = 1,
				     .l = code, .db = !code };
}

static void fill(uint8_t *memory)
{
	uint64_t gdt[] = { 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF }, ring0 = RING0;

	*(uint64_t *)(memory + PML4) = PDPT | 7;
	((uint64_t *)(memory + PDPT))[0] = PD | 7;
	((uint64_t *)(memory + PDPT))[1] = 0x87;                        // 1 GiB
	*(uint64_t *)(memory + PD) = 0x87;                              // 2 MiB
	memcpy(memory + GDT, gdt, sizeof(gdt));
	memcpy(memory + TSS + 4, &ring0, 8);
	for (int i = 0; i < 256; i++)
		((uint64_t *)(memory + IDT))[2 * i] = (uint64_t)HALT | 8 << 16 | 0xEE00ull << 32;
	memory[HALT] = memory[SYSCALL] = 0xF4;
	memcpy(memory + USER, "\x90\x90\x90\xF4", 4);                   // at CPL3 the HLT is a #GP
}

static int play(const char *name, const char *code, int length, int user, int steps)
{
	int dev = open("/dev/kvm", O_RDWR), vm = ioctl(dev, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_run *run = mmap(NULL, ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	struct kvm_userspace_memory_region region = { .memory_size = SIZE, .userspace_addr = (uintptr_t)memory };
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[200]; } cpuid = { .head.nent = 200 };
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[2]; } msrs = { { .nmsrs = 2 }, { { MSR_STAR, 0, 8ull << 32 }, { MSR_LSTAR, 0, SYSCALL } } };
	struct kvm_guest_debug debug = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP };
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK, .rflags = 2 };
	struct kvm_sregs sregs;

	fill(memory);
	memcpy(memory + CODE, code, length);
	OR_DIE(ioctl(vm, KVM_SET_TSS_ADDR, 0xFFFBD000));
	OR_DIE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	OR_DIE(ioctl(dev, KVM_GET_SUPPORTED_CPUID, &cpuid));
	OR_DIE(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
	OR_DIE(ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs = user ? segment(0x33, 11, 3, 1) : segment(8, 11, 0, 1);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = user ? segment(0x2B, 3, 3, 0) : segment(0x10, 3, 0, 0);
	sregs.tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = 0x18, .type = 11, .present = 1 };
	sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = 0x37 };
	sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 0xFFF };
	sregs.cr0 = 0x80010021, sregs.cr3 = PML4, sregs.cr4 = 0x620, sregs.efer = 0xD01;
	OR_DIE(ioctl(vcpu, KVM_SET_SREGS, &sregs));
	OR_DIE(ioctl(vcpu, KVM_SET_REGS, &regs));
	OR_DIE(ioctl(vcpu, KVM_SET_MSRS, &msrs) - 2);
	if (steps)
		OR_DIE(ioctl(vcpu, KVM_SET_GUEST_DEBUG, &debug));
	do
		OR_DIE(ioctl(vcpu, KVM_RUN, 0));
	while (--steps > 0);
	OR_DIE(ioctl(vcpu, KVM_GET_REGS, &regs));
	OR_DIE(ioctl(vcpu, KVM_GET_SREGS, &sregs));
	printf("%s %u 0x%llx 0x%x 0x%llx\n", name, run->exit_reason, regs.rip, sregs.cs.selector,
	       regs.rsp <= SIZE - 8 ? *(unsigned long long *)(memory + regs.rsp) : 0);
	return close(vcpu) | close(vm) | close(dev);
}

int main(void)
{
	static const char iretq[] = "\x6A\x2B\x6A\x00\x6A\x02\x6A\x33\x68\x00\x69\x00\x00\x48\xCF"; // push SS, RSP, flags, CS, USER
	int bad = 0;

	bad |= play("step", "\x90\x90\xF4", 3, 0, 1) | play("step_user", "\x90\x90\xF4", 3, 1, 1);
	bad |= play("syscall", "\x0F\x05", 2, 0, 0) | play("syscall_user", "\x0F\x05", 2, 1, 0);
	bad |= play("int3", "\xCC", 1, 0, 0) | play("int3_user", "\xCC", 1, 1, 0);
	bad |= play("int_n", "\xCD\x77", 2, 0, 0) | play("int_n_user", "\xCD\x77", 2, 1, 0);
	bad |= play("gib", "\x8A\x04\x25\x00\x00\x00\x40\xF4", 8, 0, 0) | play("step_iretq", iretq, sizeof(iretq) - 1, 0, 6);
	return bad;
}
