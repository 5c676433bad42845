/* A global exists once in every VM: what one guest writes, another never sees. */
#include "labkit.h"

volatile uint64_t secret = 1;

void guest_code(uint64_t vcpu)
{
	secret = secret * 2;
	GUEST_PRINTF("my secret is %lu\n", secret);
	GUEST_DONE();
}
