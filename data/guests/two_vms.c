/* A global exists once in every VM: what one guest writes, another never sees. */
#include "labkit.h"

volatile uint64_t secret = 1;
volatile int32_t balance = -5;
char greeting[16] = "good morning";

void guest_code(uint64_t vcpu)
{
	GUEST_SYNC(secret);
	secret = secret * 2;
	balance -= 1;
	GUEST_PRINTF("%s: secret %lu, balance %d\n", greeting, secret, balance);
	GUEST_ASSERT_NE(secret, 0);
	GUEST_DONE();
}
