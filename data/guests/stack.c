/* hello.c in the old way, with its struct ucall on the stack: compiled with -DLABKIT_UCALL_ON_STACK. */
#include "labkit.h"

void guest_code(uint64_t vcpu)
{
	GUEST_SYNC(1);
	GUEST_PRINTF("hello from vCPU %lu\n", vcpu);
	GUEST_DONE();
}
