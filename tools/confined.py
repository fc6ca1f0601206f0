"""Inside the sandbox: the process that puts the layers on itself and then runs the program.

tools/sandbox.py starts `python -I -c <the text of this file> <the arguments of perform as JSON>`.
So this file imports nothing of ours.
"""
import ctypes
import fcntl
import json
import os
import sys
import types
from contextlib import suppress

OUT_OF_MEMORY = 113         # exit code of a program that raised MemoryError
# Python refuses to read and write whole numbers of more than 4,300 digits. Some tests have longer
# ones, so LiveCodeBench allows as many as this.
DIGITS = 50_000


def limit(layers, memory, seconds):
    """Put the first two layers on this process, and on all that it starts. Raises OSError."""
    libc = ctypes.CDLL(None)
    if "process limits" in layers:
        import resource
        if sys.platform == "linux":
            libc.prctl(38, 1, 0, 0, 0)      # PR_SET_NO_NEW_PRIVS: set-uid programs give no rights
        # NPROC counts all threads of this user (before Linux 5.14 also outside the namespace), so
        # it cannot be small. CPU is a second clock, in case our own process dies while it waits.
        for name, most in {"AS": memory, "CPU": seconds, "FSIZE": 32 << 20, "NOFILE": 128,
                           "NPROC": 1024, "CORE": 0}.items():
            with suppress(ValueError):      # the user's own limit is lower, and stays
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    if "capabilities" in layers and libc.capset((ctypes.c_uint * 2)(0x20080522, 0), bytes(24)):
        raise OSError("capset failed")      # capset gives up the rights that only root has


def confine(layers, calls):
    """Put landlock and seccomp on this process. Nothing takes them off again. Raises an error of
    any kind if one does not work."""
    if "landlock" in layers:                # it leaves no way into /home, /proc, /tmp or /dev/shm
        from landlock import FSAccess as To, Ruleset
        rules = Ruleset()
        rules.allow(".", rules=To.all() & ~(To.EXECUTE | To.MAKE_CHAR | To.MAKE_BLOCK))
        rules.allow("/dev/null", rules=To.READ_FILE | To.WRITE_FILE)
        for path in filter(os.path.exists, (
                sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/nix/store", "/dev/urandom",
                "/etc/ld.so.cache", "/etc/localtime")):
            rules.allow(path, rules=To.READ_FILE | To.READ_DIR * os.path.isdir(path))
        rules.apply()
    if "seccomp" in layers:                 # other calls fail with 38 (ENOSYS: "not implemented")
        import termios
        # pyseccomp asks ctypes.util for its library, which would start ldconfig (10 ms). So we
        # answer in its place.
        ctypes.util = sys.modules["ctypes.util"] = types.SimpleNamespace(
            find_library={"seccomp": "libseccomp.so.2"}.get)
        from pyseccomp import ALLOW, EQ, ERRNO, LE, MASKED_EQ, Arg, SyscallFilter
        del sys.modules["ctypes.util"]
        rules, me, thread = SyscallFilter(ERRNO(38)), os.getpid(), 0x10400
        for name in calls:
            rules.add_rule(ALLOW, name)
        for name, *condition in (           # on one argument, counted from 0
                # Threads that share one table of files. (Each further table holds 128 sockets.)
                ("clone", 0, MASKED_EQ, thread, thread),
                # Maps that are private, or of a file. The pages of other maps stay when the map
                # gets smaller, and RLIMIT_AS does not count them.
                ("mmap", 3, MASKED_EQ, 0xf, 2), ("mmap", 3, MASKED_EQ, 0x21, 1),
                ("kill", 0, EQ, me), ("tgkill", 0, EQ, me), ("prlimit64", 0, EQ, 0),
                ("socketpair", 0, EQ, 1), ("sendto", 4, EQ, 0),
                ("ioctl", 1, EQ, termios.FIONBIO), ("ioctl", 1, EQ, termios.FIOCLEX),
                ("fcntl", 1, LE, 7), ("fcntl", 1, EQ, 1030)):   # flags, locks; F_DUPFD_CLOEXEC
            rules.add_rule(ALLOW, name, Arg(*condition))
        rules.load()


def perform(layers, memory, seconds, calls, err, check):
    """Put the layers on, run program.py and, in a check, the test in the file `check`.

    Exit code 0 proves nothing (`os._exit(0)`), and neither does printed text. So we read a random
    number only after the program has ended, and write it back only after the test."""
    limit(layers, memory, seconds)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)      # PR_SET_PDEATHSIG: SIGKILL if our parent dies
    with suppress(OSError):         # our parent holds this lock, or the file system has no locks
        fcntl.flock(os.open(".", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os._exit(1)                 # it has died even before that
    if "namespaces" in layers:
        # Signals do not kill the first process of a namespace, not even its own SIGKILL. So the
        # program is a second one. Exit codes are those of a shell: 128 + the signal.
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code if code >= 0 else 128 - code)
    confine(layers, calls)
    os.write(2, b"layers are on\n")             # from now on, a failure is the program's own
    os.dup2(err, 2)                             # the program cannot reach our log, and unshare's
    sys.argv = ["program.py"]
    sys.set_int_max_str_digits(DIGITS)
    name = "program" if check else "__main__"   # a check does not run the program's demonstration
    module = sys.modules[name] = types.ModuleType(name)
    try:
        with open("program.py", encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, "program.py", "exec"), vars(module))
        if check:
            with os.fdopen(check, "r+", encoding="utf-8") as file:
                nonce, test = json.load(file)
                exec(compile(test, "test.py", "exec"), vars(module))
                value = json.dumps(getattr(module, "_value", None), default=lambda x: x.tolist())
                file.seek(0)
                file.truncate()
                file.write(nonce + value)
            with suppress(Exception):           # the program may have closed it, or set another one
                sys.stdout.flush()
            os._exit(0)                         # no thread and no atexit can change it now
    except MemoryError:                         # too little may be left for a traceback
        os.write(2, b"MemoryError: more than the allowed memory\n")
        os._exit(OUT_OF_MEMORY)
    except Exception as problem:                # shown without our own line in the traceback
        problem.__traceback__ = problem.__traceback__.tb_next
        sys.__excepthook__(type(problem), problem, problem.__traceback__)
        sys.exit(1)


if __name__ == "__main__":
    perform(**json.loads(sys.argv[1]))
