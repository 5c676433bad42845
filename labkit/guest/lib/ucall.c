/* SPDX-License-Identifier: MIT */
/* ucall.c: take a slot of the pool, fill it, leave for the host, give it back. The host makes the pool and writes ucall_pool. */
#include "labkit.h"

struct ucall_header *ucall_pool;

#ifdef LABKIT_UCALL_ON_STACK
/* The old way, kept to show what is wrong with it: the struct lies on the stack, and the host gets its guest-virtual address. */
const uint8_t ucall_is_on_stack = 1;
#define UCALL_BEGIN(uc) struct ucall local = {}, *uc = &local
#else
#define UCALL_BEGIN(uc) struct ucall *uc = ucall_alloc()
#endif

/* The first slot whose bit was clear. With none left the host is told by a magic number, for there is no slot to tell it with. */
noinline struct ucall *ucall_alloc(void)
{
	struct ucall_header *pool = ucall_pool;
	struct ucall *uc;
	int i;

	for (i = 0; pool && i < KVM_MAX_VCPUS; i++) {
		if (!test_and_set_bit(i, pool->in_use)) {
			uc = &pool->ucalls[i];
			__builtin_memset(uc->args, 0, sizeof(uc->args));
			return uc;
		}
	}
	ucall_arch_do_ucall(GUEST_UCALL_FAILED);
	return NULL;
}

noinline void ucall_free(struct ucall *uc)
{
	clear_bit(uc - ucall_pool->ucalls, ucall_pool->in_use);
}

/* What the host learns is the address in its own space, so it never has to translate one of ours. */
static void send_and_free(struct ucall *uc)
{
#ifdef LABKIT_UCALL_ON_STACK
	ucall_arch_do_ucall((vm_vaddr_t)uc);
#else
	ucall_arch_do_ucall((vm_vaddr_t)READ_ONCE(uc->hva));
	ucall_free(uc);
#endif
}

void ucall(uint64_t cmd, int nargs, ...)
{
	UCALL_BEGIN(uc);
	va_list args;
	int i;

	if (!uc)
		return;
	WRITE_ONCE(uc->cmd, cmd);
	va_start(args, nargs);
	for (i = 0; i < nargs && i < UCALL_MAX_ARGS; i++)
		WRITE_ONCE(uc->args[i], va_arg(args, uint64_t));
	va_end(args);
	send_and_free(uc);
}

void ucall_fmt(uint64_t cmd, const char *fmt, ...)
{
	UCALL_BEGIN(uc);
	va_list args;

	if (!uc)
		return;
	WRITE_ONCE(uc->cmd, cmd);
	va_start(args, fmt);
	guest_vsnprintf(uc->buffer, UCALL_BUFFER_LEN, fmt, args);
	va_end(args);
	send_and_free(uc);
}

void ucall_assert(uint64_t cmd, const char *exp, const char *file, unsigned int line, const char *fmt, ...)
{
	UCALL_BEGIN(uc);
	va_list args;

	if (!uc)
		return;
	WRITE_ONCE(uc->cmd, cmd);
	WRITE_ONCE(uc->args[GUEST_ERROR_STRING], (uint64_t)exp);
	WRITE_ONCE(uc->args[GUEST_FILE], (uint64_t)file);
	WRITE_ONCE(uc->args[GUEST_LINE], line);
	va_start(args, fmt);
	guest_vsnprintf(uc->buffer, UCALL_BUFFER_LEN, fmt, args);
	va_end(args);
	send_and_free(uc);
}

void ucall_unhandled(uint64_t vector, uint64_t error_code, uint64_t pc, uint64_t fault_gva)
{
	UCALL_BEGIN(uc);

	if (!uc)
		return;
	WRITE_ONCE(uc->cmd, UCALL_UNHANDLED);
	WRITE_ONCE(uc->args[0], vector);
	WRITE_ONCE(uc->args[1], error_code);
	WRITE_ONCE(uc->args[2], pc);
	WRITE_ONCE(uc->args[3], fault_gva);
	guest_snprintf(uc->buffer, UCALL_BUFFER_LEN, "no handler for exception %lu at %#lx (error code %#lx, fault address %#lx)",
		       vector, pc, error_code, fault_gva);
	send_and_free(uc);
}
