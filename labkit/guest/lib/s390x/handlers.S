/* SPDX-License-Identifier: MIT */
/* s390x/handlers.S: where the program new PSW points to, the way in and out of route_exception(). */
	.section .note.GNU-stack, "", %progbits

	.text
	.globl pgm_check_handler
	.type pgm_check_handler, %function
	.balign 8
pgm_check_handler:
	stmg %r0, %r15, -144(%r15)	/* below the stack pointer is nobody's; there is no other place to begin with */
	lay %r15, -160(%r15)
	lghi %r1, 0x150			/* the program old PSW, by its real address: page 0 is not mapped */
	lurag %r2, %r1
	lghi %r1, 0x158
	lurag %r3, %r1
	stmg %r2, %r3, 0(%r15)
	lgr %r2, %r15
	lay %r15, -160(%r15)
	brasl %r14, route_exception
	lay %r15, 160(%r15)
	lg %r1, 136(%r15)		/* r15 as the handler leaves it */
	mvc 128(16,%r1), 0(%r15)	/* the floating-point part of the save area there: no guest has a use for it */
	lmg %r0, %r15, 16(%r15)
	lpswe 128(%r15)
	.size pgm_check_handler, . - pgm_check_handler
