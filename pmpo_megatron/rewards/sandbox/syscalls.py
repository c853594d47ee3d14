"""The seccomp filter of the sandbox: system calls that no program needs fail, so that bugs behind them cannot be reached.

Format: classic BPF over ``struct seccomp_data`` (linux/seccomp.h, linux/bpf_common.h), as ``bwrap --seccomp FD`` reads it.
"""

from __future__ import annotations

import os
import platform
import struct

from pmpo_megatron.errors import PmpoError

# (x86-64, aarch64); None where the architecture lacks the call. Numbers: asm/unistd_64.h, asm-generic/unistd.h.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # The network: the namespace has none either.
    "socket": (41, 198),
    # Other processes, the sandbox's own first one above all.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Memory that the limit of the address space does not count, and what outlives its processes.
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # Namespaces, mounts, other users' files.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    # Wide doors into the kernel.
    "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_setup": (206, 0), "splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75),
    "personality": (135, 92), "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    # The machine.
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "syslog": (103, 116), "quotactl": (179, 60), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
# Calls from 424 on have one number everywhere. All are absent (ENOSYS: libc falls back) but these: pidfd_open, close_range,
# openat2, faccessat2, epoll_pwait2, futex_waitv. So io_uring, clone3, the new mount calls and whatever comes next are out.
FIRST_COMMON = 424
ALLOWED_COMMON = (434, 436, 437, 439, 441, 449)
CLONE, PRLIMIT = (56, 220), (302, 261)
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
X32 = 0x40000000
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; both architectures are little-endian
ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # errno EPERM, ENOSYS


def filter_program(machine: str | None = None) -> bytes:
    """The filter for ``machine``, by default this one.

    Raises:
        PmpoError: an architecture whose system calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCHITECTURES:
        raise PmpoError(f"the sandbox knows the system calls of {', '.join(AUDIT_ARCHITECTURES)}, not of {machine}")
    column = list(AUDIT_ARCHITECTURES).index(machine)
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for number in ALLOWED_COMMON:
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    code += [(JUMP_AT_LEAST, 0, 1, FIRST_COMMON), (RETURN, 0, 0, ABSENT)]
    code += [(JUMP_EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (JUMP_SET, 0, 1, NEW_NAMESPACES)]
    code += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    # A program may set its own limits, and not those of the process that starts programs.
    code += [(JUMP_EQUAL, 0, 3, PRLIMIT[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (JUMP_EQUAL, 1, 0, 0)]
    code += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def filter_file() -> int:
    """A descriptor of a file in memory that holds the filter, at its beginning."""
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, filter_program())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
