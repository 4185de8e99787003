// SPDX-License-Identifier: Apache-2.0
// Has patterns in all registers of an arm64 thread, SVE's included where there is SVE, and below its stack
// pointer, and looks whether they stay. Prints "ready", and at SIGTERM how often they did, and did not.

#include <signal.h>
#include <stdio.h>
#include <sys/auxv.h>

#define HWCAP_SVE_BIT (1UL << 22)

int general(void);
int vectors(void);

__asm__(
	".arch armv8.2-a+sve\n"
	".macro save\n"
	"stp x29, x30, [sp, #-160]!\n stp x19, x20, [sp, #16]\n stp x21, x22, [sp, #32]\n stp x23, x24, [sp, #48]\n"
	"stp x25, x26, [sp, #64]\n stp x27, x28, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
	"stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
	".endm\n"
	".macro restore\n"
	"ldp d14, d15, [sp, #144]\n ldp d12, d13, [sp, #128]\n ldp d10, d11, [sp, #112]\n ldp d8, d9, [sp, #96]\n"
	"ldp x27, x28, [sp, #80]\n ldp x25, x26, [sp, #64]\n ldp x23, x24, [sp, #48]\n ldp x21, x22, [sp, #32]\n"
	"ldp x19, x20, [sp, #16]\n ldp x29, x30, [sp], #160\n"
	".endm\n"

	".globl general\n general:\n save\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
	"ldr x0, =0x1111000000000000 + \\n\n dup v\\n\\().2d, x0\n"
	".endr\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,29,30\n"
	"ldr x\\n, =0x2222000000000000 + \\n\n"
	".endr\n"
	"mov x27, #0xa0000000\n msr nzcv, x27\n"
	"ldr x27, =40000\n 1: sub x27, x27, #1\n cbnz x27, 1b\n"
	"mrs x27, nzcv\n mov x28, #0xa0000000\n cmp x27, x28\n b.ne 9f\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,29,30\n"
	"ldr x28, =0x2222000000000000 + \\n\n cmp x\\n, x28\n b.ne 9f\n"
	".endr\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
	"ldr x28, =0x1111000000000000 + \\n\n mov x27, v\\n\\().d[0]\n cmp x27, x28\n b.ne 9f\n"
	"mov x27, v\\n\\().d[1]\n cmp x27, x28\n b.ne 9f\n"
	".endr\n"
	"restore\n mov x0, #0\n ret\n"
	"9: restore\n mov x0, #1\n ret\n"
	".ltorg\n"

	".globl vectors\n vectors:\n save\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30\n"
	"ldr x0, =0x3333000000000000 + \\n\n dup z\\n\\().d, x0\n"
	".endr\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n ptrue p\\n\\().d\n .endr\n"
	"ldr x27, =40000\n 1: sub x27, x27, #1\n cbnz x27, 1b\n"
	"cntd x26\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n cntp x27, p\\n, p\\n\\().d\n cmp x27, x26\n b.ne 9f\n .endr\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30\n"
	"ldr x28, =0x3333000000000000 + \\n\n dup z31.d, x28\n cmpne p1.d, p0/z, z\\n\\().d, z31.d\n b.any 9f\n"
	".endr\n"
	"restore\n mov x0, #0\n ret\n"
	"9: restore\n mov x0, #1\n ret\n"
	".ltorg\n");

static volatile int end;

static void stop(int number)
{
	(void)number;
	end = 1;
}

int main(void)
{
	int sve = !!(getauxval(AT_HWCAP) & HWCAP_SVE_BIT);
	long good = 0, bad = 0;

	signal(SIGTERM, stop);
	puts("ready");
	fflush(stdout);
	while (!end)
		if (general() || (sve && vectors()))
			bad++;
		else
			good++;
	printf("%ld %ld %d\n", good, bad, sve);
	return 0;
}
