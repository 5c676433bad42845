/* SPDX-License-Identifier: MIT */
/* riscv64/handlers.S: the trap vector, the way in and out of route_exception(). */
	.section .note.GNU-stack, "", %progbits

	.text
	.globl exception_vectors
	.type exception_vectors, %function
	.balign 4
exception_vectors:
	addi sp, sp, -272
	sd ra, 0(sp)
	addi ra, sp, 272
	sd ra, 8(sp)
	.irp reg, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
	sd x\reg, 8*(\reg - 1)(sp)
	.endr
	csrr s0, sepc
	csrr s1, sstatus
	csrr s2, scause
	sd s0, 248(sp)
	sd s1, 256(sp)
	sd s2, 264(sp)
	mv a0, sp
	call route_exception
	ld s0, 248(sp)
	ld s1, 256(sp)
	csrw sepc, s0
	csrw sstatus, s1
	ld ra, 0(sp)
	.irp reg, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
	ld x\reg, 8*(\reg - 1)(sp)
	.endr
	addi sp, sp, 272
	sret
	.size exception_vectors, . - exception_vectors
