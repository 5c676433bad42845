/* Asks CPUID where the C-bit is: its host answers, or where registers are encrypted the guest gets a #VC. */
#include "labkit.h"

void guest_code(uint64_t vcpu)
{
	uint32_t eax, ebx, ecx, edx;

	cpuid(0x8000001f, &eax, &ebx, &ecx, &edx);
	GUEST_SYNC1(ebx & 63);
	GUEST_DONE();
}
