/* Guests that misbehave, one function each: what the host must survive and explain. */
#include "labkit.h"

extern struct ucall_header *ucall_pool;

void guest_code(uint64_t vcpu)
{
	for (;;)
		cpu_relax();
}

void guest_jumps_to_nowhere(uint64_t vcpu)
{
	((void (*)(void))0x123456000)();
}

void guest_fills_bitmap(uint64_t vcpu)
{
	memset(ucall_pool->in_use, 0xff, sizeof(ucall_pool->in_use));
	GUEST_SYNC(1);
}

void guest_forges_hva(uint64_t vcpu)
{
	for (int i = 0; i < KVM_MAX_VCPUS; i++)
		ucall_pool->ucalls[i].hva = (struct ucall *)(0x4141414141414141 + i);
	GUEST_SYNC(1);
}

/* A PRINTF whose text has no end, with bytes that are no UTF-8, by hand. */
void guest_endless_text(uint64_t vcpu)
{
	struct ucall *uc = &ucall_pool->ucalls[0];

	set_bit(0, ucall_pool->in_use);
	uc->cmd = UCALL_PRINTF;
	memset(uc->buffer, 0xfe, sizeof(uc->buffer));
	ucall_arch_do_ucall((vm_vaddr_t)uc->hva);
	GUEST_DONE();
}

void guest_unknown_command(uint64_t vcpu)
{
	ucall(0x17, 1, 0x99UL);
	GUEST_DONE();
}

static noinline uint64_t recurse(volatile uint64_t depth)
{
	return depth ? recurse(depth + 1) + depth : 0;
}

void guest_overflows_stack(uint64_t vcpu)
{
	GUEST_SYNC(recurse(1));
}

/* With the IDT gone, the first fault is the last. */
void guest_loses_idt(uint64_t vcpu)
{
	struct { uint16_t limit; uint64_t base; } __packed none = { 0, 0 };

	asm volatile("lidt %0; ud2" : : "m"(none));
}

void guest_halts(uint64_t vcpu)
{
	hlt();
	GUEST_DONE();
}
