// A kernel that does nothing: an arm64 Image to kexec into, so that memory can be looked at as it
// crossed. It prints "@ stub dtb=0x<address>" on the PL011 of QEMU's virt machine, and waits.

	.set	UART, 0x9000000
	.set	UART_FLAGS, 0x18
	.set	UART_FULL_BIT, 5

	.text
start:
	b	begin			// what the header's first word runs
	.word	0
	.quad	0			// offset from a multiple of 2 MiB
	.quad	4096			// bytes in memory
	.quad	0xa			// little-endian, pages of 4 KiB, anywhere in memory
	.quad	0, 0, 0
	.ascii	"ARM\x64"
	.word	0

begin:
	mov	x19, x0
	mov	x20, #UART
	adr	x21, text
1:	ldrb	w0, [x21], #1
	cbz	w0, 2f
	bl	put
	b	1b
2:	mov	x22, #60		// 16 digits, the first one highest
3:	lsr	x0, x19, x22
	and	x0, x0, #0xf
	add	x0, x0, #'0'
	cmp	x0, #'9'
	b.ls	4f
	add	x0, x0, #('a' - '0' - 10)
4:	bl	put
	subs	x22, x22, #4
	b.pl	3b
	mov	x0, #'\n'
	bl	put
5:	wfi
	b	5b

put:
	ldr	w1, [x20, #UART_FLAGS]
	tbnz	w1, #UART_FULL_BIT, put
	strb	w0, [x20]
	ret

text:
	.asciz	"\n@ stub dtb=0x"
	.balign	4096
