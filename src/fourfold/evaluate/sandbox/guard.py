"""The inside of the sandbox: started as ``python -I -S -B guard.py JOB REPORT``, standard library only.

JOB and REPORT are open files, by number. It gives up what it can (see ``isolate``), sets its limits, runs the
program of the job in this interpreter and, only if the program came to its end, writes the job's token to the
report. So an exit code says nothing, and a program that exits early has not passed.

Price: program and tests share one interpreter, as HumanEval's tests need it. A program written to cheat could
search the interpreter for the token; the kernel's walls around the process do not depend on that.

Sources: user_namespaces(7), mount_setattr(2), capabilities(7), setrlimit(2), prctl(2), seccomp(2),
landlock(7).
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
SYS_MOUNT_SETATTR = 442  # on every architecture
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION_3 = 0x20080522
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_ALLOW, SECCOMP_ERRNO = 22, 2, 0x7FFF0000, 0x50000
CLONE_THREAD, SYS_CLONE3 = 0x10000, 435
# machine -> AUDIT_ARCH, clone, prctl, and what is refused: (fork, vfork,) execve, execveat, unshare make
# processes; setsid, setpgid leave the group that is killed at the end; socket, io_uring_setup reach sockets
# with a path, and the hypervisor, which no network namespace holds back; shmget, msgget, memfd_create hold
# memory that no limit counts; add_key, request_key, keyctl see the caller's keys
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        56,
        157,
        (57, 58, 59, 322, 272, 112, 109, 41, 425, 29, 68, 319, 248, 249, 250),
    ),
    "aarch64": (0xC00000B7, 220, 167, (221, 281, 97, 157, 154, 198, 425, 194, 186, 279, 217, 218, 219)),
}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
LANDLOCK_VERSION, LANDLOCK_BENEATH = 1, 1
# landlock(7): rights to write, remove and make; then, each with the first version that knows it, refer,
# truncate and ioctl of devices
WRITE_FILE, WRITES, LATER_WRITES = 1 << 1, 0x1FF2, ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
SCOPE_VERSION, SCOPE_SIGNALS = 6, 2
FILES_WALL, NETWORK_WALL = "files read-only outside its own folder", "no network"


def main() -> None:
    """Read the job, close the doors, run, report."""
    job_file, report = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(job_file) as file:
        job = json.load(file)
    walls = ["own process", "limits", *isolate(job["limits"]["disk_bytes"])]
    limit(job["limits"])
    if sys.platform == "linux":
        walls += [wall for wall in forbid() if wall not in walls]
    if not cannot_fork():  # no filter here; this limit counts threads too, and does not bind root
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if cannot_fork():
        walls.append("no new processes")
    write(report, {"isolation": walls})
    write(report, verdict(job["program"], job["token"]))
    os._exit(0)  # not sys.exit: threads and exit handlers of the program must not hold up the end


def write(report: int, line: dict) -> None:
    """One line of JSON."""
    os.write(report, json.dumps(line).encode() + b"\n")


def verdict(program: str, token: str) -> dict:
    """Run the program as a main module; the token only when its last line was reached."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: it came before the end
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"token": token}


def isolate(disk_bytes: int) -> list[str]:
    """Give up rights and surroundings as far as the system allows. Returns what was had, for the record."""
    walls = []
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.geteuid() == 0 and become_nobody(libc):
        walls.append("user nobody")
    if sys.platform == "linux":
        walls += namespaces(libc, disk_bytes)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if write_only_here(libc) and FILES_WALL not in walls:
            walls.append(FILES_WALL)
    return walls


def become_nobody(libc: ctypes.CDLL) -> bool:
    """Root drops to nobody, unless nobody could then not read the standard library."""
    os.chown(".", NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        with Path(os.__file__).open():
            pass
    except OSError:
        return False
    finally:
        os.seteuid(0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if sys.platform == "linux":
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would stay root's, and with it the uid map
    return True


def namespaces(libc: ctypes.CDLL, disk_bytes: int) -> list[str]:
    """Own network, processes and read-only files, in a new user namespace; then no capability is left."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID) != 0:
        return []
    walls = [NETWORK_WALL, "no other processes in sight"]
    with contextlib.suppress(OSError):
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(line)
        if read_only_files(libc, disk_bytes):
            walls.append(FILES_WALL)
    child = os.fork()  # only children are inside a new process namespace
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0x7F)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc.capset(header, nothing)
    return walls


def read_only_files(libc: ctypes.CDLL, disk_bytes: int) -> bool:
    """Everything mounted becomes read-only; the working folder becomes a small memory disk, /proc an empty
    one, since it tells of other processes of the same user, their environment included."""
    here = str(Path.cwd()).encode()
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    options = f"size={disk_bytes},nr_inodes=1000,mode=0700".encode()
    done = (
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32) == 0
        and libc.mount(b"tmpfs", here, b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0
        and libc.mount(b"tmpfs", b"/proc", b"tmpfs", MS_RDONLY, b"size=4096,nr_inodes=2") == 0
    )
    os.chdir(here)
    return done


def write_only_here(libc: ctypes.CDLL) -> bool:
    """Landlock: nothing outside the working folder (and /dev/null) is opened for writing, and no process
    outside gets a signal or is looked into. A read-only mount leaves devices and named pipes writable."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    rights = WRITES | sum(right for first, right in LATER_WRITES if first <= version)
    scoped = SCOPE_SIGNALS if version >= SCOPE_VERSION else 0
    wanted = (ctypes.c_uint64 * 3)(rights, 0, scoped)  # files, network ports, scopes
    rules = libc.syscall(LANDLOCK_CREATE, wanted, ctypes.sizeof(wanted), 0)
    for path, allowed in ((".", rights), (os.devnull, WRITE_FILE | rights & 1 << 14)):
        place = os.open(path, os.O_PATH)
        libc.syscall(LANDLOCK_ADD, rules, LANDLOCK_BENEATH, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    done = libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def limit(limits: dict) -> None:
    """Limits of this process; the hard ones, so that they cannot be raised again."""
    cpu_s = limits["cpu_s"]
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def forbid() -> list[str]:
    """A system call filter, see SYSCALLS: threads yes, processes no, and no sockets. Returns the wall that
    the latter are."""
    if platform.machine() not in SYSCALLS:
        return []
    arch, clone, prctl, refused = SYSCALLS[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse = (answer, 0, 0, SECCOMP_ERRNO | errno.EPERM)
    steps = [(load, 0, 0, 4), (equal, 1, 0, arch), refuse]
    steps += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]  # x32 calls: other numbers
    for number in refused:
        steps += [(equal, 0, 1, number), refuse]
    # ENOSYS sends the C library to clone, whose flags a filter can see
    steps += [(equal, 0, 1, SYS_CLONE3), (answer, 0, 0, SECCOMP_ERRNO | errno.ENOSYS)]
    # to die with its parent is not to be taken back
    steps += [(equal, 0, 3, prctl), (load, 0, 0, 16), (equal, 0, 1, PR_SET_PDEATHSIG), refuse]
    steps += [(load, 0, 0, 0), (equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), refuse]
    steps += [(answer, 0, 0, SECCOMP_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    done = ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0
    return [NETWORK_WALL] if done else []


def cannot_fork() -> bool:
    """Whether new processes are really refused: by the filter, or by RLIMIT_NPROC."""
    try:
        child = os.fork()
    except OSError:
        return True
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    main()
