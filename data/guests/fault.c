/* Exceptions: one that nobody handles, one that the guest handles, one that was expected. */
#include "labkit.h"

static volatile uint64_t nr_faults;

/* Nobody handles this page fault: the host hears of it as an UNHANDLED ucall. */
void guest_code(uint64_t vcpu)
{
	*(volatile uint64_t *)0xdead0000 = vcpu;
	GUEST_DONE();
}

static void skip_ud2(struct ex_regs *regs)
{
	nr_faults++;
	regs->rip += 2;
}

/* Handled in the guest, twice, by a handler that steps over the two bytes of UD2. */
void guest_handles(uint64_t vcpu)
{
	set_exception_handler(UD_VECTOR, skip_ud2);
	asm volatile("ud2");
	asm volatile("ud2");
	GUEST_ASSERT_EQ(nr_faults, 2);
	GUEST_SYNC(nr_faults);
	GUEST_DONE();
}

/* Expected: the vector comes back like a return value. */
void guest_expects(uint64_t vcpu)
{
	uint64_t value;

	GUEST_SYNC(rdmsr_safe(0x12345678, &value));
	GUEST_ASSERT_EQ(rdmsr_safe(0xc0000080, &value), 0);
	GUEST_ASSERT(value & BIT(8));
	GUEST_DONE();
}

void guest_fails(uint64_t vcpu)
{
	uint64_t one = 1, two = 2;

	GUEST_ASSERT_EQ(one, two);
	GUEST_DONE();
}
