/* Several vCPUs at once: each takes slots of the one pool while the others do the same. */
#include "labkit.h"

atomic_t nr_done;

void guest_code(uint64_t vcpu)
{
	for (uint64_t i = 0; i < 3; i++)
		GUEST_SYNC_ARGS(i, vcpu, i * 10, 0, 0);
	GUEST_PRINTF("vCPU %lu is number %d to finish\n", vcpu, atomic_inc_return(&nr_done));
	GUEST_DONE();
}
