/* SPDX-License-Identifier: MIT */
/* x86_64/handlers.S: 256 entry stubs, the table of their addresses, and the way in and out of route_exception(). */
	.section .note.GNU-stack, "", %progbits

	.section .rodata
	.globl idt_handlers
	.type idt_handlers, @object
	.balign 8
idt_handlers:

	.text
	/* These vectors come with an error code of the processor's; the others get a zero, so that struct ex_regs has one shape. */
	.set HAS_ERROR_CODE, (1 << 8) | (1 << 10) | (1 << 11) | (1 << 12) | (1 << 13) | (1 << 14) | (1 << 17) | (1 << 21) | (1 << 29) | (1 << 30)
	.set vector, 0
	.rept 256
	.balign 16
1:	.pushsection .rodata
	.quad 1b
	.popsection
	.if (vector > 31) || (((HAS_ERROR_CODE >> (vector & 31)) & 1) == 0)
	push $0
	.endif
	push $vector
	jmp handle_exception
	.set vector, vector + 1
	.endr

	.section .rodata
	.size idt_handlers, . - idt_handlers

	.text
	.type handle_exception, @function
handle_exception:
	.irp reg, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
	push %\reg
	.endr
	mov %rsp, %rdi
	cld
	call route_exception
	.irp reg, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
	pop %\reg
	.endr
	add $16, %rsp
	iretq
	.size handle_exception, . - handle_exception
