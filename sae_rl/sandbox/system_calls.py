"""The system calls that a program in the sandbox may not make, as a seccomp filter.

The filter refuses what namespaces leave open: namespaces inside the sandbox, memory that belongs to no process and so
escapes the memory limit, sockets of families that a network namespace does not cover, and parts of the kernel in which
many holes were found. libseccomp would need a system library on every machine; these few calls need only their numbers.
"""

from __future__ import annotations

import platform
import struct

ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # REFUSE | errno
EPERM, ENOSYS = 1, 38
AF_UNIX = 1
NAMESPACES = 0x7E020080  # all CLONE_NEW* flags
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld [k]; jeq #k; jset #k; ret #k
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, lower halves
X32 = 0x40000000  # x86_64 takes the same calls once more under numbers with this bit

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # BPF's number of the machine, column below
REFUSED = {
    # sockets: a network namespace does not cover vsock and others
    "socket": (41, 198),
    # memory that belongs to no process
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190)},
    **{"msgget": (68, 186), "mq_open": (240, 180)},
    # namespaces inside the sandbox: their root could mount file systems in memory
    **{"unshare": (272, 97), "setns": (308, 268)},
    # other processes: inside.py runs under no limits
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"pidfd_getfd": (438, 438)},
    # parts of the kernel that no solution of a problem needs
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
}
CLONE, CLONE3, SOCKETPAIR = (56, 220), (435, 435), (53, 199)  # refused or allowed by their first argument


def system_call_filter() -> bytes:
    """The filter for this machine. Raises OSError if the machine is neither x86_64 nor aarch64."""
    if platform.machine() not in MACHINES:
        raise OSError(f"system calls are known for {' and '.join(MACHINES)}, and this machine is {platform.machine()}")
    return assembled(*MACHINES[platform.machine()])


def assembled(architecture: int, column: int) -> bytes:
    """A BPF program, an array of ``struct sock_filter``.

    Args:
        architecture: BPF's number of the machine.
        column: the column of `REFUSED` that has the machine's numbers.
    """
    code: list[tuple[int, int, int, int]] = [  # (operation, k, jump if true, jump if false)
        (LOAD, ARCHITECTURE, 0, 0),
        (EQUAL, architecture, 1, 0),
        (RETURN, REFUSE | EPERM, 0, 0),  # a 32-bit program: its numbers mean other calls
        (LOAD, NUMBER, 0, 0),
        (ANY_BIT, X32, 0, 1),
        (RETURN, REFUSE | ENOSYS, 0, 0),
    ]
    for numbers in REFUSED.values():
        code += [(EQUAL, numbers[column], 0, 1), (RETURN, REFUSE | EPERM, 0, 0)]
    code += [
        # clone3 has its flags behind a pointer, where a filter cannot look. Without it, libc calls clone.
        (EQUAL, CLONE3[column], 0, 1),
        (RETURN, REFUSE | ENOSYS, 0, 0),
        (EQUAL, CLONE[column], 0, 4),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (ANY_BIT, NAMESPACES, 0, 1),
        (RETURN, REFUSE | EPERM, 0, 0),
        (RETURN, ALLOW, 0, 0),
        (EQUAL, SOCKETPAIR[column], 0, 3),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (EQUAL, AF_UNIX, 1, 0),
        (RETURN, REFUSE | EPERM, 0, 0),
        (RETURN, ALLOW, 0, 0),
    ]
    return b"".join(struct.pack("HBBI", operation, true, false, k) for operation, k, true, false in code)
