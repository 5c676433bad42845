/* SPDX-License-Identifier: MIT */
/* arm64/handlers.S: the sixteen vectors, and the way in and out of route_exception(). */
	.section .note.GNU-stack, "", %progbits

	.text
	.globl vectors
	.balign 2048
vectors:
	.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	.balign 128
	sub sp, sp, #272
	msr tpidrro_el0, x0	/* nothing is accessed through a stack pointer that may be */
	mov x0, sp		/* what the exception is about (SCTLR_EL1.SA) */
	str x1, [x0, #8]
	mrs x1, tpidrro_el0
	str x1, [x0]
	and sp, x0, #~15
	mov x1, #\vector
	b handle_exception
	.endr
	.balign 128

	.type handle_exception, %function
handle_exception:
	.irp reg, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29
	str x\reg, [x0, #8 * \reg]
	.endr
	add x2, x0, #272
	stp x30, x2, [x0, #240]
	mrs x2, elr_el1
	mrs x3, spsr_el1
	stp x2, x3, [x0, #256]
	mov x19, x0
	bl route_exception
	mov x0, x19
	ldp x2, x3, [x0, #256]
	msr elr_el1, x2
	msr spsr_el1, x3
	.irp reg, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
	ldr x\reg, [x0, #8 * \reg]
	.endr
	add sp, x0, #272
	ldr x0, [x0]
	eret
	.size handle_exception, . - handle_exception
