/* DONE never comes back, so its slot never does: a host that enters this guest 512 times has filled the pool for ever. */
#include "labkit.h"

void guest_code(uint64_t vcpu)
{
	GUEST_DONE();
}
