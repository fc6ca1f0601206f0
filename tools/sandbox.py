"""Run untrusted Python in a sandbox: for tool-calling agents and code benchmarks.

A program runs in a process and a fresh folder of its own. Both are gone afterwards. The process
also gets all of LAYERS that work on this machine. The layers overlap on purpose: each one that the
table names is enough to stop the attack.

    A program may try to                                    It is stopped by
    read your environment and its keys                      the start (it gets another one)
    read the environment or memory of other processes       namespaces, landlock
    open, list, write or remove your files                  landlock
    leave files elsewhere, for example in /dev/shm          landlock
    change modes, owners, times or flags of your files      seccomp
    see the names of files that others make                 seccomp
    reach the network or abstract sockets of this machine   namespaces, seccomp
    reach sockets of this machine that have a path          seccomp
    signal, trace or slow down your processes               namespaces, seccomp
    leave processes or shared memory behind                 namespaces, seccomp
    live on if our own process is killed                    namespaces, seccomp
    start other programs                                    landlock, seccomp
    set the clock, make devices, lift its limits, as root   namespaces, capabilities
    take all memory or processor time, fill a file          process limits
    take memory without an address (sockets, shared maps)   seccomp
    run for ever, or leave a folder that takes ages to go   timeout_s, CLEAN_UP_S
    pass by an early exit or a printed verdict              a random number (see perform)

landlock needs Linux 5.13 and `pip install landlock`. seccomp needs `pip install pyseccomp` and the
system's libseccomp.so.2.

Some attacks are not stopped:

- Program and test share one process. A program can fake a pass in `passes`, or the value in
  `call_function`: it can return an object that equals everything, patch a module that the test
  imports, or find our files through frames or descriptors. So right answers stay out of the process
  where possible.
- No layer sees `stat` and `readlink`, which tell the size of a file and the aim of a link by name.
  No layer sees a read lock on a file of the system that the program may read.
- No layer counts files. Many files of 32 MB fill the disk, or the memory if the temporary folder is
  there. (Without landlock, a shared map of /dev/zero is such a file of any size.)
- The memory limit does not see the kernel's own tables. Each map of memory may take 8 kB of them. A
  process may have 65,530 maps (vm.max_map_count), so half a GB is not counted.
- The kernel does not count root's threads. 10,000 threads can share one stack. Then each of them
  takes 16 kB or more of the kernel's memory. As many as the system has process numbers for keep
  other programs from starting until the program ends.
"""
import ctypes
import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir, mkdtemp

from tools import confined

LAYERS = ("process limits", "capabilities", "namespaces", "landlock", "seccomp")
# The kernel kills what setpriv starts when the thread that started it dies. unshare passes this on
# to the first process of its namespaces. (See also `perform` in tools/confined.py.)
UNSHARE = ("setpriv --pdeathsig KILL "
           "unshare --map-current-user --ipc --net --pid --kill-child --mount-proc").split()
OUTPUT_CAP = 8_000_000      # bytes kept of stdout, of stderr and of a function's value
MEMORY_MB = 1024            # for the data of a program
CHECK_MEMORY_MB = 4096      # the same in a check: evalplus's cap, because Mbpp/255 takes 2200
FOR_PYTHON_MB = 512         # address space beside the data: interpreter + numpy peak at 140 MB
CLEAN_UP_S = 10             # how long we wait for the removal of a folder
FOLDER = "recursivemas-sandbox-"        # so begin the names of our folders
# The system calls of an ordinary program (64 bits). They change only the program itself and the
# files that landlock leaves to it. We also tried a list of forbidden calls. But libseccomp 2.5 has
# no names for the newest calls (setxattrat, file_setattr), so they stayed open.
CALLS = Path(__file__).with_name("system_calls.txt").read_text().split()
# The new process gets our second file as a text. Importing this one would take it 30 ms more.
INSIDE = Path(confined.__file__).read_text(encoding="utf-8")
sys.set_int_max_str_digits(confined.DIGITS)     # our own process reads such numbers, too


class SandboxError(RuntimeError):
    """The sandbox itself did not start. The error says nothing about the program."""


@dataclass
class Run:
    """How a program ended. status: ok | error (an exception, or an exit code other than 0) |
    timeout | memory (it raised MemoryError) | killed (by a signal, its own or the kernel's, or with
    an exit code over 128, as a shell shows signals)."""
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
        folder = mkdtemp(prefix=FOLDER)
        stack.callback(remove, folder)
        with suppress(OSError):                 # a file system may know no locks
            lock(folder, stack)
        Path(folder, "program.py").write_bytes(code.encode("utf-8", "replace"))
        # Files, because nobody has to read or write them while the program runs, unlike pipes.
        # The input lies in the folder: only there may the program open it again, as /dev/stdin.
        given = stack.enter_context(TemporaryFile(dir=folder))
        check, out, err, log = [stack.enter_context(TemporaryFile()) for _ in range(4)]
        for file, text in (given, stdin), (check, json.dumps([nonce, test])):
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
        job = {"layers": layers, "memory": memory_mb + FOR_PYTHON_MB << 20, "err": err.fileno(),
               "seconds": int(timeout_s) + 2, "check": None if test is None else check.fileno(),
               "calls": CALLS}
        command = [sys.executable, "-I", "-c", INSIDE, json.dumps(job)]
        if "namespaces" in layers:
            command = [*UNSHARE, *command]
        process = subprocess.Popen(
            command, cwd=folder, stdin=given, stdout=out, stderr=log,
            pass_fds=(check.fileno(), err.fileno()), start_new_session=True,
            # One thread: numpy reserves memory for each, and on 64 cores more than the limit.
            env={"PATH": "/usr/bin:/bin:/run/current-system/sw/bin", "LANG": "C.UTF-8",
                 "HOME": folder, "OMP_NUM_THREADS": "1"})
        in_time = wait_and_end(process, timeout_s, "namespaces" in layers)
        seconds = time.monotonic() - start
        proof, stdout, stderr, said = map(read_output, (check, out, err, log))
    if in_time and "layers are on" not in said:
        raise SandboxError(f"the sandbox did not start: {said.strip()[-300:]}")
    code = process.returncode
    ended = {0: "ok", confined.OUT_OF_MEMORY: "memory"}.get(
        code, "error" if 0 < code <= 128 else "killed")
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
    fcntl.fcntl(file, fcntl.F_SETFL, 0)     # it may have set O_DIRECT, with which pread fails
    written = os.pread(file.fileno(), OUTPUT_CAP + 1, 0)
    text = written[:OUTPUT_CAP].decode("utf-8", "replace").replace("\0", "\ufffd")
    return text + "\n[output cut here]" if len(written) > OUTPUT_CAP else text


def remove(folder):
    """Remove a folder, however deep or locked it is. After CLEAN_UP_S seconds we stop waiting, and
    rm continues in the background."""
    # Modes of folders only: `chmod -R` would change a file outside that the program has linked.
    unlock = "find \"$0\" -type d -execdir chmod u+rwx {} ';'"
    script = f'rm -rf "$0" 2> /dev/null || {{ {unlock} 2> /dev/null; rm -rf "$0"; }}'
    with suppress(subprocess.TimeoutExpired):               # shutil.rmtree fails on deep folders
        subprocess.Popen(["sh", "-c", script, folder], start_new_session=True).wait(CLEAN_UP_S)


def lock(folder, stack):
    """Lock a folder until `stack` ends or we die. Raises OSError if another process holds it."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, held)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_left_behind():
    """Remove the folders of our user's runs that were killed: nobody holds their lock any more."""
    for folder in Path(gettempdir()).glob(FOLDER + "*"):
        with suppress(OSError), ExitStack() as stack:
            about = folder.lstat()
            if about.st_uid == os.geteuid() and time.time() - about.st_mtime > 10:
                lock(folder, stack)             # a newer one may not be locked yet
                remove(folder)


@functools.cache
def sandbox_layers():
    """The LAYERS that work here: with each, a small program still prints what it should. Tested
    once per process."""
    def printed(layers):
        for _ in range(2):              # a machine may be full or busy for a moment
            with suppress(SandboxError, OSError):
                run = confined_run("import numpy\nprint(numpy)", "", 30, MEMORY_MB, layers=layers)
                if run.status == "ok":
                    return run.stdout

    remove_left_behind()
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
