"""Run untrusted Python in a sandbox: for tool-calling agents and code benchmarks.

A program runs in a process and a fresh folder of its own. Both are gone afterwards. The process
also gets all of LAYERS that work on this machine. The layers overlap on purpose: each one that the
table names is enough to stop the attack.

    A program may try to                                    It is stopped by
    read your environment and its keys                      the start (it gets another one)
    read the environment or memory of other processes       namespaces, landlock
    open, list, write or remove your files                  landlock
    change modes, owners, times or flags of your files      seccomp
    see the names of files that others make                 seccomp
    reach the network or abstract sockets of this machine   namespaces, seccomp
    reach sockets of this machine that have a path          seccomp
    signal, trace or slow down your processes               namespaces, seccomp
    leave processes or shared memory behind                 namespaces, seccomp
    start other programs                                    landlock, seccomp
    set the clock, make devices, lift its limits, as root   namespaces, capabilities
    take all memory or processor time, fill a file          process limits
    take memory without an address (memfd, sockets)         seccomp
    run for ever, or leave a folder that takes ages to go   timeout_s, CLEAN_UP_S
    pass by an early exit or a printed verdict              a random number (see perform)

landlock needs Linux 5.13 and `pip install landlock`. seccomp needs `pip install pyseccomp` and the
system's libseccomp.so.2.

Some attacks are not stopped:

- Program and test share one process. A program can fake a pass in `passes`, or the value in
  `call_function`: it can return an object that equals everything, patch a module that the test
  imports, or find our files through frames or descriptors. So right answers stay out of the process
  where possible.
- No layer sees `stat`, which tells the size of a file by its name.
- No layer counts files. Many files of 32 MB fill the disk, or the memory if the temporary folder is
  there.
- The kernel does not count root's threads. The memory limit alone bounds them.
"""
import ctypes
import functools
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import types
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp

LAYERS = ("process limits", "capabilities", "namespaces", "landlock", "seccomp")
UNSHARE = "unshare --map-current-user --ipc --net --pid --kill-child --mount-proc".split()
OUTPUT_CAP = 8_000_000      # bytes kept of stdout, of stderr and of a function's value
MEMORY_MB = 1024            # for the data of a program
CHECK_MEMORY_MB = 4096      # the same in a check: evalplus's cap, because Mbpp/255 takes 2200
FOR_PYTHON_MB = 512         # address space beside the data: interpreter + numpy peak at 140 MB
OUT_OF_MEMORY = 113         # exit code of a program that raised MemoryError
CLEAN_UP_S = 10             # how long we wait for the removal of a folder
# The system calls of an ordinary program (64 bits). They change only the program itself and the
# files that landlock leaves to it. We also tried a list of forbidden calls. But libseccomp 2.5 has
# no names for the newest calls (setxattrat, file_setattr), so they stayed open.
CALLS = Path(__file__).with_name("system_calls.txt").read_text()


class SandboxError(RuntimeError):
    """The sandbox itself did not start. The error says nothing about the program."""


@dataclass
class Run:
    """How a program ended. status: ok | error (an exception, or an exit code other than 0) |
    timeout | memory (it raised MemoryError) | killed (by a signal, its own or the kernel's)."""
    status: str
    stdout: str
    stderr: str
    seconds: float
    value: object = None        # call_function only


def run_python(code, stdin="", timeout_s=10, memory_mb=MEMORY_MB):
    """Run `code` as a script (`__main__`) in the sandbox -> Run. Thread-safe. Raises SandboxError.

    After timeout_s of wall time, start included, the program and its processes are killed. (Without
    namespaces and seccomp, a process that left the program's group survives.) memory_mb bounds the
    program's data. Output is cut at OUTPUT_CAP."""
    return confined_run(code, stdin, timeout_s, memory_mb)


def passes(code, test, timeout_s=10):
    """Run `code` as a module, then `test` in it -> Run. Status ok means: both ran to the end.
    Raises SandboxError."""
    return confined_run(code, "", timeout_s, CHECK_MEMORY_MB, test=test)


def call_function(code, function, arguments, timeout_s=6):
    """Call Solution().function(*arguments) of `code`, or function(*arguments) -> Run with `value`.

    Arguments and value travel as JSON of at most OUTPUT_CAP bytes, so a tuple or an array becomes a
    list. Raises SandboxError."""
    found = f"getattr(globals().get('Solution', object)(), {function!r}, None) or {function}"
    call = f"_value = ({found})(*__import__('json').loads({json.dumps(arguments)!r}))"
    return confined_run(code, "", timeout_s, CHECK_MEMORY_MB, test=call)


def confined_run(code, stdin, timeout_s, memory_mb, test=None, layers=None):
    """Run a program, and in a check also its test, under these layers (None: all that work here)
    -> Run. Raises SandboxError."""
    nonce, start = os.urandom(16).hex(), time.monotonic()
    layers = sandbox_layers() if layers is None else layers
    with ExitStack() as stack:
        folder = mkdtemp(prefix="sandbox-")
        stack.callback(remove, folder)
        Path(folder, "program.py").write_bytes(code.encode("utf-8", "replace"))
        # Files, because nobody has to read or write them while the program runs, unlike pipes.
        # The input lies in the folder: only there may the program open it again, as /dev/stdin.
        given = stack.enter_context(TemporaryFile(dir=folder))
        check, out, err, log = [stack.enter_context(TemporaryFile()) for _ in range(4)]
        for file, text in (given, stdin), (check, json.dumps([nonce, test])):
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
        job = {"layers": layers, "memory": memory_mb + FOR_PYTHON_MB << 20, "err": err.fileno(),
               "seconds": int(timeout_s) + 2, "check": None if test is None else check.fileno()}
        command = [sys.executable, "-I", "-c", LAUNCHER, json.dumps(job)]
        process = subprocess.Popen(
            UNSHARE + command if "namespaces" in layers else command, cwd=folder, stdin=given,
            stdout=out, stderr=log, pass_fds=(check.fileno(), err.fileno()), start_new_session=True,
            # One thread: numpy reserves memory for each, and on 64 cores more than the limit.
            env={"PATH": "/usr/bin:/bin:/run/current-system/sw/bin", "LANG": "C.UTF-8",
                 "HOME": folder, "OMP_NUM_THREADS": "1"})
        in_time = wait_and_end(process, timeout_s, "namespaces" in layers)
        seconds = time.monotonic() - start
        proof, stdout, stderr, said = map(read_output, (check, out, err, log))
    if in_time and "layers are on" not in said:
        raise SandboxError(f"the sandbox did not start: {said.strip()[-300:]}")
    ended = {0: "ok", OUT_OF_MEMORY: "memory"}.get(
        process.returncode, "error" if process.returncode > 0 else "killed")
    run = Run(ended if in_time else "timeout", stdout, stderr, seconds)
    if test is not None and run.status == "ok":
        try:
            run.value = json.loads(proof.removeprefix(nonce) if proof.startswith(nonce) else "")
        except (ValueError, RecursionError) as problem:     # it ended early, or made up a value
            run.status, run.stderr = "error", f"{stderr}\n[no result: {problem}]"
    return run


def wait_and_end(process, timeout_s, namespaced):
    """Wait for a process, then end it and its children -> whether it ended in time."""
    late = time.monotonic() + timeout_s
    try:
        while process.poll() is None and time.monotonic() < late:
            time.sleep(0.003)               # process.wait would look only 20 times per second
        return process.returncode is not None
    finally:
        # If the first process of a namespace is killed, all others in it end too. Its parent,
        # unshare, ends after them. So we kill that first process, unless it has ended meanwhile.
        with suppress(OSError, ValueError):
            if namespaced and process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                os.kill(int(children), signal.SIGKILL)
                process.wait()
        with suppress(ProcessLookupError):                  # raised if its group is empty
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_output(file):
    """The output of a program as a text, with U+FFFD for nulls and for bytes that are not UTF-8."""
    import fcntl
    fcntl.fcntl(file, fcntl.F_SETFL, 0)     # it may have set O_DIRECT, with which pread fails
    written = os.pread(file.fileno(), OUTPUT_CAP + 1, 0)
    text = written[:OUTPUT_CAP].decode("utf-8", "replace").replace("\0", "\ufffd")
    return text + "\n[output cut here]" if len(written) > OUTPUT_CAP else text


def remove(folder):
    """Remove a folder, however deep or locked it is. After CLEAN_UP_S seconds we stop waiting, and
    rm continues in the background."""
    script = 'rm -rf "$0" 2> /dev/null || { chmod -R u+rwx "$0"; rm -rf "$0"; }'
    with suppress(subprocess.TimeoutExpired):               # shutil.rmtree fails on deep folders
        subprocess.Popen(["sh", "-c", script, folder], start_new_session=True).wait(CLEAN_UP_S)


@functools.cache
def sandbox_layers():
    """The LAYERS that work here: with each, a small program still prints what it should. Tested
    once per process."""
    def printed(layers):
        with suppress(SandboxError, OSError):
            run = confined_run("import numpy\nprint(numpy)", "", 30, MEMORY_MB, layers=layers)
            return run.stdout

    bare, active = printed([]), []
    for name in LAYERS:
        if bare and printed([*active, name]) == bare:
            active.append(name)
    if sys.platform == "linux" and bare and not {"namespaces", "landlock"} & set(active):
        # /proc shows our environment to every process of this user, unless we forbid it.
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)      # PR_SET_DUMPABLE
    return tuple(active)


def require_sandbox(allow_unsafe=False):
    """Print the layers that work here and the attacks that none of them stops -> the layers.
    Scripts call this at their start. Raises ValueError where not even process limits work, unless
    `allow_unsafe`."""
    layers = sandbox_layers()
    if "process limits" not in layers and not allow_unsafe:
        raise ValueError("python cannot be confined on this machine (it has no process limits): "
                         "--allow_unsafe_code runs it all the same")
    print(f"sandbox: {', '.join(layers) or 'none'} (tools/sandbox.py tells more)", flush=True)
    for risk, stops in re.findall("^    (.+?)   +(.+)$", __doc__, re.MULTILINE):    # the table
        if set(stops.split(", ")) <= set(LAYERS) - set(layers):
            print(f"sandbox WITHOUT {stops}: a program can {risk}", flush=True)
    return layers


def confine(layers, memory, seconds):
    """Put layers on this process. Nothing takes them off again. Raises an error of any kind if a
    layer does not work."""
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
        rules, me, thread = SyscallFilter(ERRNO(38)), os.getpid(), 0x10000
        for name in CALLS.split():
            rules.add_rule(ALLOW, name)
        for name, *condition in (           # on one argument, counted from 0
                ("clone", 0, MASKED_EQ, thread, thread), ("kill", 0, EQ, me), ("tgkill", 0, EQ, me),
                ("prlimit64", 0, EQ, 0), ("socketpair", 0, EQ, 1), ("sendto", 4, EQ, 0),
                ("ioctl", 1, EQ, termios.FIONBIO), ("ioctl", 1, EQ, termios.FIOCLEX),
                ("fcntl", 1, LE, 7), ("fcntl", 1, EQ, 1030)):   # flags, locks; F_DUPFD_CLOEXEC
            rules.add_rule(ALLOW, name, Arg(*condition))
        rules.load()


def perform(layers, memory, seconds, err, check):
    """Put the layers on, run program.py and, in a check, the test in the file `check`.

    Exit code 0 proves nothing (`os._exit(0)`), and neither does printed text. So we read a random
    number only after the program has ended, and write it back only after the test."""
    confine(layers, memory, seconds)
    os.write(2, b"layers are on\n")             # from now on, a failure is the program's own
    os.dup2(err, 2)                             # the program cannot reach our log, and unshare's
    sys.argv = ["program.py"]
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
            sys.stdout.flush()
            os._exit(0)                         # no thread and no atexit can change it now
    except MemoryError:                         # too little may be left for a traceback
        os.write(2, b"MemoryError: more than the allowed memory\n")
        os._exit(OUT_OF_MEMORY)
    except Exception as problem:                # shown without our own line in the traceback
        traceback.print_exception(type(problem), problem, problem.__traceback__.tb_next)
        sys.exit(1)


# The new process runs the source text of two functions. Importing this file would take 30 ms more.
LAUNCHER = f"""import ctypes, json, os, sys, traceback, types\nfrom contextlib import suppress
{OUT_OF_MEMORY=}\n{CALLS=}\n{inspect.getsource(confine)}\n{inspect.getsource(perform)}
perform(**json.loads(sys.argv[1]))"""
