/* Three ucalls: a number, a text, the end. Each takes a slot of the pool and gives it back, except the last. */
#include "labkit.h"

void guest_code(uint64_t vcpu)
{
	GUEST_SYNC(1);
	GUEST_PRINTF("hello from vCPU %lu\n", vcpu);
	GUEST_DONE();
}
