/*
 * The kernel's selftest library as the peer of labkit's kvm engine: "peer WHAT COUNT" prints the CPU nanoseconds of one
 * round, the best of five. Linked against tools/testing/selftests/kvm/lib of Linux 6.12 when the figures are measured.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kvm_util.h"
#include "processor.h"
#include "ucall_common.h"

static void guest_syncs(void)
{
	for (uint64_t n = 0;; n++)
		GUEST_SYNC(n);
}

static void guest_pio(void)
{
	for (;;)
		asm volatile("inb $0x80, %%al" : : : "rax");
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void sync_rounds(struct kvm_vcpu *vcpu, long count)
{
	struct ucall uc;

	while (count--) {
		vcpu_run(vcpu);
		TEST_ASSERT(get_ucall(vcpu, &uc) == UCALL_SYNC, "no SYNC");
	}
}

static void pio_rounds(struct kvm_vcpu *vcpu, long count)
{
	struct kvm_regs regs;

	while (count--) {
		vcpu_run(vcpu);
		TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
		vcpu_regs_get(vcpu, &regs);
	}
}

static void creations(struct kvm_vcpu *unused, long count)
{
	struct kvm_vcpu *vcpu;

	while (count--)
		kvm_vm_free(vm_create_with_one_vcpu(&vcpu, guest_syncs));
}

int main(int argc, char **argv)
{
	bool pio = !strcmp(argv[1], "pio"), create = !strcmp(argv[1], "create");
	void (*rounds)(struct kvm_vcpu *, long) = create ? creations : pio ? pio_rounds : sync_rounds;
	struct kvm_vcpu *vcpu;
	double best = 1e18;

	vm_create_with_one_vcpu(&vcpu, pio ? guest_pio : guest_syncs);
	for (int i = 0; i < 5; i++) {
		double start = now(), took;

		rounds(vcpu, atol(argv[2]));
		took = (now() - start) / atol(argv[2]);
		if (took < best)
			best = took;
	}
	printf("%.0f\n", best);
	return 0;
}
