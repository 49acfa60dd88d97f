"""The system calls that a program in the sandbox may not make, as a seccomp filter.

It takes away what namespaces and limits do not: network, signals to others, what is known of files, memory that no limit
counts, and the parts of the kernel that hold most of its holes. It works without any right, also in containers that allow
no namespaces.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence

ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # | errno
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
AF_UNIX = 1
NAMESPACES = 0x7E020080  # CLONE_NEW*, all of them
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld [k]; jeq #k; jset #k; ret #k
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data, lower halves
X32 = 0x40000000  # bit of the numbers by which x86_64 takes the same calls once more

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # its name for BPF, its column below
REFUSED: dict[str, tuple[int, int | None]] = {
    # the network, and sockets of other programs on this machine
    **{"socket": (41, 198)},
    # other processes
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434)},
    **{"pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270)},
    **{"process_vm_writev": (311, 271), "process_madvise": (440, 440), "process_mrelease": (448, 448)},
    **{"kcmp": (312, 272), "migrate_pages": (256, 238), "move_pages": (279, 239), "setpriority": (141, 140)},
    **{"ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119)},
    **{"sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    # of files what Landlock does not guard: modes, owners, times, attributes; in its first versions their lengths too
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None)},
    **{"fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None)},
    **{"futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6)},
    **{"fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15)},
    **{"fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45)},
    # memory that is in no process and no folder
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190)},
    **{"msgget": (68, 186), "mq_open": (240, 180)},
    # namespaces and mounts
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41)},
    **{"chroot": (161, 51), "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"open_by_handle_at": (304, 265)},
    # what no program needs that solves a problem
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
}
# Some of these calls are allowed, by an argument.
CLONE, CLONE3, SOCKETPAIR, PRLIMIT = (56, 220), (435, 435), (53, 199), (302, 261)
FCNTL, IOCTL = (72, 25), (16, 29)
# A file that is ready for reading signals its owner, which may be any process: who becomes it, and by which signal.
OWNERS_BY_FCNTL = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
OWNERS_BY_IOCTL = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP


def filter_here() -> bytes | None:
    """For this machine; None: its calls are not known here."""
    if platform.machine() not in MACHINES:
        return None
    architecture, column = MACHINES[platform.machine()]
    return assembled(architecture, column)


def assembled(architecture: int, column: int) -> bytes:
    """A BPF program, an array of ``struct sock_filter``."""
    code: list[tuple[int, int, int, int]] = [  # (operation, k, jump if true, jump if false)
        (LOAD, ARCHITECTURE, 0, 0),
        (EQUAL, architecture, 1, 0),
        (RETURN, REFUSE | EPERM, 0, 0),  # a program of another architecture, whose numbers mean other calls
        (LOAD, NUMBER, 0, 0),
        (ANY_BIT, X32, 0, 1),
        (RETURN, REFUSE | ENOSYS, 0, 0),
    ]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, number, 0, 1), (RETURN, REFUSE | EPERM, 0, 0)]
    # Its flags are behind a pointer, where a filter cannot look: libc then takes clone instead.
    code += [(EQUAL, CLONE3[column], 0, 1), (RETURN, REFUSE | ENOSYS, 0, 0)]
    code += [
        (EQUAL, CLONE[column], 0, 4),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (ANY_BIT, NAMESPACES, 0, 1),
        (RETURN, REFUSE | EPERM, 0, 0),
        (RETURN, ALLOW, 0, 0),
        (EQUAL, SOCKETPAIR[column], 0, 4),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (EQUAL, AF_UNIX, 1, 0),
        (RETURN, REFUSE | EAFNOSUPPORT, 0, 0),
        (RETURN, ALLOW, 0, 0),
        (EQUAL, PRLIMIT[column], 0, 4),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (EQUAL, 0, 1, 0),  # of itself
        (RETURN, REFUSE | EPERM, 0, 0),
        (RETURN, ALLOW, 0, 0),
    ]
    code += _refused_with(FCNTL[column], OWNERS_BY_FCNTL)
    code += _refused_with(IOCTL[column], OWNERS_BY_IOCTL)
    code += [(RETURN, ALLOW, 0, 0)]
    return b"".join(struct.pack("HBBI", operation, true, false, k) for operation, k, true, false in code)


def _refused_with(number: int, commands: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """A call whose second argument may be none of these."""
    tests = [(EQUAL, command, len(commands) - i, 0) for i, command in enumerate(commands)]
    ends = [(RETURN, ALLOW, 0, 0), (RETURN, REFUSE | EPERM, 0, 0)]
    return [(EQUAL, number, 0, 1 + len(tests) + len(ends)), (LOAD, SECOND_ARGUMENT, 0, 0), *tests, *ends]
