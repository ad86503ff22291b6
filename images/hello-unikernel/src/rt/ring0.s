# All that runs in ring 0: from the boot loader to Rust in ring 3, interrupts, and six services behind INT3.
#
# Why Rust runs in ring 3: it may use all ports and all memory there, interrupts change to a stack of their own and so
# leave its red zone alone, and on hosts that have to interpret ring 0 it runs at full speed. Nothing here uses more than
# integer instructions, so SSE registers need no saving, and such hosts can interpret it.

    .set MAX_CPUS, 32           # as in cpus.rs
    .set CPU_SHIFT, 15          # log2 of the bytes that each processor has in `cpus`
    .set RING0_STACK, 12288     # of those: task state, then the stack of ring 0; the rest is the stack of ring 3
    .set TSS_SIZE, 104 + 8192   # with a permission bit for every port
    .set TRAMPOLINE, 0x1000     # as in cpus.rs: where other processors start

    .set CODE32, 0x08           # selectors in the GDT below
    .set DATA, 0x10
    .set CODE64, 0x18
    .set USER_DATA, 0x20 | 3
    .set USER_CODE, 0x28 | 3
    .set FIRST_TSS, 0x30

    .set APIC, 0xfee00000       # local APIC (SDM volume 3, chapter 12)
    .set APIC_ID, 0x20          # bits 24 to 31
    .set APIC_EOI, 0xb0
    .set APIC_SPURIOUS, 0xf0
    .set APIC_ICR, 0x300
    .set APIC_TIMER, 0x320
    .set APIC_TIMER_COUNT, 0x380
    .set APIC_TIMER_DIVIDE, 0x3e0

    .set APIC_TIMER_PERIODIC, 0x20000
    .set APIC_TIMER_DEADLINE, 0x40000
    .set TSC_DEADLINE, 0x6e0    # MSR
    .set DEADLINE_CYCLES, 20000000

    .set SERVICE_VECTOR, 3      # INT3, since hosts that let ring 3 run natively may refuse INT n and SYSCALL
    .set TIMER_VECTOR, 0x20
    .set DEVICE_VECTOR, 0x21    # as in interrupts.rs
    .set SPURIOUS_VECTOR, 0xff

# --- What boot loaders look for -----------------------------------------------------------------------------------------

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .set MULTIBOOT_FLAGS, 1 << 16 | 1 << 1      # addresses follow; tell us about memory
    .section .multiboot, "a"
    .balign 4
multiboot_header:
    .long 0x1badb002, MULTIBOOT_FLAGS, -(0x1badb002 + MULTIBOOT_FLAGS)
    .long multiboot_header, image_start, data_end, image_end, multiboot_start

# --- 32 bits, no paging, no stack; EBX: what the loader has to tell ------------------------------------------------------

    .text
    .code32
    .global pvh_start
pvh_start:
    movl $1, %esi
    jmp first_cpu
multiboot_start:
    movl $2, %esi
first_cpu:
    cli
    cld
    xorl %edi, %edi

# To 64 bits. EDI: number of this processor; ESI, EBX: for `start_cpu`.
to_long_mode:
    lgdt gdt_pointer
    movl %cr4, %eax
    orl $0x620, %eax            # PAE; OSFXSR and OSXMMEXCPT, without which SSE faults
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $0x9ffffff3, %eax      # caches on; EM and TS off, for SSE again
    orl $0x80000023, %eax       # PG, NE, MP, PE
    movl %eax, %cr0
    ljmp $CODE64, $long_mode

# --- Other processors start here, in real mode, at TRAMPOLINE ------------------------------------------------------------

    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl TRAMPOLINE + (trampoline_gdt - trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $other_cpu
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
other_cpu:
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $1, %edi
    lock xaddl %edi, CPUS_STARTED
    cmpl $MAX_CPUS, %edi
    jb to_long_mode
too_many:
    hlt
    jmp too_many

# --- 64 bits --------------------------------------------------------------------------------------------------------------

    .code64
long_mode:
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %edi, %edi             # what 32-bit code left in the upper halves is undefined
    movl %esi, %esi
    movl %ebx, %ebx

    # This processor's piece of `cpus`, and its task state: RSP0, and an I/O bitmap in which 0 means allowed. (An I/O
    # privilege level of 3 would be shorter, but not every host heeds it.)
    movl %edi, %r8d
    shll $CPU_SHIFT, %r8d
    addl $cpus, %r8d
    leaq RING0_STACK(%r8), %rsp
    movq %rsp, 4(%r8)
    movw $104, 102(%r8)
    movb $0xff, TSS_SIZE(%r8)
    movl %edi, %ecx
    shll $4, %ecx
    leaq gdt + FIRST_TSS(%rcx), %rdx
    movw $TSS_SIZE, (%rdx)
    movw %r8w, 2(%rdx)
    movl %r8d, %eax
    shrl $16, %eax
    movb %al, 4(%rdx)
    movb $0x89, 5(%rdx)         # an available 64-bit task state segment
    movb %ah, 7(%rdx)
    addl $FIRST_TSS, %ecx
    ltr %cx

    testl %edi, %edi
    jnz tables_done
    call make_idt
    movb $0xff, %al             # the old interrupt controllers, if there are any, keep quiet
    outb %al, $0x21
    outb %al, $0xa1
tables_done:
    lidt idt_pointer
    movl $APIC, %eax
    movl $0x100 | SPURIOUS_VECTOR, APIC_SPURIOUS(%rax)

    # start_cpu(processor, protocol, information) in ring 3, with interrupts on.
    movl %ebx, %edx
    leaq (1 << CPU_SHIFT) - 8(%r8), %rax
    pushq $USER_DATA
    pushq %rax
    pushq $0x202
    pushq $USER_CODE
    pushq $start_cpu
    iretq

make_idt:
    pushq %rdi
    pushq %rsi
    movl $idt, %ecx
    movl $exceptions, %eax      # one stub every 16 bytes, one gate every 16 bytes
next_exception:
    movl %eax, %esi
    call make_gate
    addl $16, %eax
    addl $16, %ecx
    cmpl $exceptions_end, %eax
    jb next_exception
    movl $idt + TIMER_VECTOR * 16, %ecx
    movl $timer_tick, %esi
    call make_gate
    movl $idt + DEVICE_VECTOR * 16, %ecx
    movl $device_interrupt, %esi
    call make_gate
    movl $idt + SPURIOUS_VECTOR * 16, %ecx
    movl $spurious, %esi
    call make_gate
    movl $idt + SERVICE_VECTOR * 16, %ecx
    movl $service, %esi
    call make_gate
    movb $0xee, 5(%rcx)         # ring 3 may use this one
    popq %rsi
    popq %rdi
    ret

# Interrupt gate at RCX to ESI.
make_gate:
    movw %si, (%rcx)
    movw $CODE64, 2(%rcx)
    movb $0x8e, 5(%rcx)
    shrl $16, %esi
    movw %si, 6(%rcx)
    ret

# --- Exceptions: ring 3 goes on in fault_report(vector, error code, address, CR2) ----------------------------------------

    .balign 16
exceptions:
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if !((0x60227d00 >> \vector) & 1)          # those that push no error code
    pushq $0
    .endif
    pushq $\vector
    jmp exception
    .endr
    .balign 16
exceptions_end:

exception:
    testb $3, 24(%rsp)
    jz crash                    # in ring 0: nobody is left to tell
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq $fault_report, (%rsp)
    andq $-16, 24(%rsp)         # its stack, past the red zone and as at the entry of any function
    subq $136, 24(%rsp)
    iretq

# --- Interrupts -----------------------------------------------------------------------------------------------------------

timer_tick:
    pushq %rax
    pushq %rcx
    pushq %rdi
    movl $APIC, %ecx
    movl APIC_ID(%rcx), %eax
    shrl $24, %eax
    lock incq TICKS(, %rax, 8)
    movl TIMERS(, %rax, 4), %edi
    movl $0, APIC_EOI(%rcx)
    testl %edi, %edi            # switched off in the meantime
    jz ticked
    testl $APIC_TIMER_PERIODIC, TIMER_MODE
    jnz ticked
    call start_timer
ticked:
    popq %rdi
    popq %rcx
    popq %rax
spurious:
    iretq

device_interrupt:
    pushq %rax
    lock incq INTERRUPTS
    movl $APIC, %eax
    movl $0, APIC_EOI(%rax)
    popq %rax
    iretq

# Starts the timer of this processor's APIC (RCX), whose mode is set: EDI is its period, 0 for off. RAX changes.
start_timer:
    testl $APIC_TIMER_DEADLINE, TIMER_MODE
    jnz set_deadline
    movl %edi, APIC_TIMER_COUNT(%rcx)
    ret
set_deadline:
    pushq %rcx
    pushq %rdx
    xorl %eax, %eax
    xorl %edx, %edx
    testl %edi, %edi
    jz write_deadline
    rdtsc
    addl $DEADLINE_CYCLES, %eax
    adcl $0, %edx
write_deadline:
    movl $TSC_DEADLINE, %ecx
    wrmsr
    popq %rdx
    popq %rcx
    ret

# --- Services: EAX which (as in ring0.rs), RDI argument; RAX and RCX change ----------------------------------------------

service:
    movl $APIC, %ecx
    cmpl $1, %eax
    jb arm_timer
    je wait_tick
    cmpl $3, %eax
    jb halt
    je crash
    cmpl $4, %eax
    je command_others
    cmpl $5, %eax
    je wait_device
    iretq

# 0: RDI is the timer's period in units of 16 bus cycles (with deadlines only whether it is 0), 0 for off.
arm_timer:
    movl APIC_ID(%rcx), %eax
    shrl $24, %eax
    movl %edi, TIMERS(, %rax, 4)
    movl $3, APIC_TIMER_DIVIDE(%rcx)
    movl TIMER_MODE, %eax
    orl $TIMER_VECTOR, %eax
    movl %eax, APIC_TIMER(%rcx)
    call start_timer
    iretq

# 1: waits for an interrupt unless TICKS is no longer RDI. No tick can be missed: interrupts are off until HLT waits.
wait_tick:
    cmpq %rdi, TICKS
    jne waited
    sti
    hlt
    cli
waited:
    iretq

# 2: never runs again.
halt:
    cli
    hlt
    jmp halt

# 3: a triple fault: an exception without a single gate to go through.
crash:
    lidt no_idt_pointer
    ud2

# 4: sends the interrupt command RDI, such as INIT, to all other processors.
command_others:
    movl %edi, APIC_ICR(%rcx)
    iretq

# 5: waits for an interrupt unless INTERRUPTS is no longer RDI; as 1.
wait_device:
    cmpq %rdi, INTERRUPTS
    jne waited
    sti
    hlt
    cli
    iretq

# --- Tables ---------------------------------------------------------------------------------------------------------------

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff    # CODE32
    .quad 0x00cf92000000ffff    # DATA
    .quad 0x00af9a000000ffff    # CODE64
    .quad 0x00cff2000000ffff    # USER_DATA
    .quad 0x00affa000000ffff    # USER_CODE
    .fill MAX_CPUS * 2, 8, 0    # task state segments
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0

# Identity map of 4 GiB in pages of 2 MiB: present, writable, user; the last GiB, where devices are, uncached. It is in
# the file, not made at the start: on hosts that interpret ring 0 these would be most of the instructions there.
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .irp gib, 0, 1, 2, 3
    .quad page_directories + \gib * 4096 + 7
    .endr
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 1536
    .quad page | 0x87
    .set page, page + 0x200000
    .endr
    .rept 512
    .quad page | 0x9f
    .set page, page + 0x200000
    .endr

    .bss
    .balign 4096
idt:
    .skip 4096
cpus:
    .skip MAX_CPUS << CPU_SHIFT
