"""Python programs of strangers, run in a sandbox: for tool-calling agents and code benchmarks.

    run = run_python("print(6 * 7)")              Run(status="ok", stdout="42\\n", ..)
    run = passes(code, test)                      status ok = code, then test, ran to their ends
    run = call_function(code, "add", [1, 2])      run.value == 3, which we compare ourselves

A model's program is a stranger's program. It runs in a process of its own, with an empty
environment, in a fresh folder that is removed afterwards. Its input and output are files without a
name. On top come as many of LAYERS as this machine has. The layers overlap on purpose. We test each
layer once on a small program. If a layer does not work here, we print what a program could then do.

A pass. Exit code 0 proves nothing (`os._exit(0)`), and neither does printed text. So our own code
inside the process reads a random number only after the program has finished, and writes it back
after the test. A program that exits early never sees the number. Right answers stay out of the
process where possible: call_function returns a value, and we compare it.

Not stopped: tampering inside the one process. A program can fake a pass in `passes`, and the value
in `call_function`, if it returns an object that equals everything, patches what the test imports,
or finds our file by walking through frames or descriptors. Disk use is not bounded while a program
runs (each file is, to 32 MB), and if you are root the number of threads is not bounded either.
"""
import contextlib
import ctypes
import functools
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Layer: what a program can do on a machine without it.
LAYERS = {
    "process limits": "take all memory and processor time",
    "pid namespace": "leave processes behind and signal yours, if seccomp is missing too",
    "net namespace": "reach the network, if seccomp is missing too",
    "landlock": "read and write every file that you can",
    "seccomp": "start processes, open sockets, change modes and times of your files",
}
# Options of the command unshare, which gives a program namespaces of its own.
UNSHARE = {"pid namespace": ["--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"],
           "net namespace": ["--net"]}
OUTPUT_CAP = 8_000_000         # bytes kept of stdout, of stderr and of a function's value
FOR_PYTHON_MB = 512            # address space beside the data: interpreter + numpy peak at 140 MB
MEMORY_MB = 1024               # for the data of a program
OUT_OF_MEMORY = 113            # exit code of a program that raised MemoryError

# The numbers of system calls that seccomp refuses, by machine (from the kernel's unistd.h). The
# lines of `denied` are: sockets, io_uring, processes and the memory of other processes; other ways
# to signal, priorities and affinity; modes, owners, times and attributes of files, which landlock
# leaves open; then what would outlive the program (shared memory, queues, keys), mounts and
# namespaces. A program may use kill, tgkill and prlimit on itself only, and clone only for threads.
# (The numbers of aarch64 were compared with the kernel's table. Only x86_64 has been run so far.)
SYSTEM_CALLS = {
    "x86_64": {"arch": 0xC000003E, "clone": 56, "kill": [62, 234], "prlimit": 302, "denied": [
        41, 425, 57, 58, 101, 310, 311, 312, 438, 440,
        129, 200, 297, 424, 141, 142, 144, 203, 251, 256, 279, 314,
        76, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452,
        463, 466, 469, 29, 64, 68, 240, 248, 249, 250, 165, 272, 298, 308, 321, 323]},
    "aarch64": {"arch": 0xC00000B7, "clone": 220, "kill": [129, 131], "prlimit": 261, "denied": [
        198, 425, 117, 270, 271, 272, 438, 440,
        130, 138, 240, 424, 118, 119, 122, 140, 30, 238, 239, 274,
        45, 5, 6, 7, 14, 15, 16, 52, 53, 54, 55, 88, 452, 463, 466, 469,
        180, 186, 190, 194, 217, 218, 219, 40, 97, 241, 268, 280, 282]},
}

# What the sandboxed process runs first. It is a text, because the process cannot import our files,
# and because no Python code should run between fork and exec in a process that may have threads.
LAUNCHER = '''
import ctypes, json, os, resource, struct, sys, traceback, types

job = json.loads(sys.argv[1])
layers, calls, orders_file = job["layers"], job["calls"], job["orders_file"]
libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    """A system call's result; raises OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


check(libc.prctl(38, 1, 0, 0, 0))            # no new privileges: set-uid programs give none
if "process limits" in layers:
    # NPROC counts all threads of this user (before Linux 5.14 also outside the namespace), so it
    # cannot be small. CPU is a second clock, in case the process that waits for this one dies.
    for name, value in {"AS": job["memory"], "CPU": job["seconds"], "FSIZE": 32 << 20,
                        "NOFILE": 128, "NPROC": 1024, "CORE": 0}.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
if "landlock" in layers:                     # from here on, only these places can be opened
    version = check(libc.syscall(444, None, 0, 1))
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1    # its rights, a bit each
    # Bits: 1 execute, 2 write a file, 4 read a file, 8 list a folder; higher bits make and remove.
    # Python and the system's libraries may be read, but nothing of /home, /proc or /tmp.
    rights = {".": known, "/dev/null": 2 + 4}
    for path in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/nix/store",
                 "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero",
                 "/sys/devices/system/cpu"):
        rights[path] = 1 + 4 + 8 * os.path.isdir(path)
    rules = check(libc.syscall(444, struct.pack("Q", known), 8, 0))
    for path in filter(os.path.exists, rights):
        place = os.open(path, os.O_PATH)
        check(libc.syscall(445, rules, 1, struct.pack("=Qi", rights[path], place), 0))
        os.close(place)
    check(libc.syscall(446, rules, 0))
    os.close(rules)
if "seccomp" in layers:     # a small program that the kernel runs at every system call
    allow, deny, absent, kill = 0x7fff0000, 0x50001, 0x50026, 0x80000000     # EPERM, ENOSYS
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, calls["arch"]), (answer, 0, 0, kill),
             (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, deny),
             (equal, 0, 1, 435), (answer, 0, 0, absent)]    # no clone3: it hides its flags
    for number in calls["denied"]:
        steps += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    # Allowed by the first argument: a thread for clone, else 0 or the own process number.
    for number, test, value in ([(calls["clone"], has_bit, 0x10000), (calls["prlimit"], equal, 0)]
                                + [(number, equal, os.getpid()) for number in calls["kill"]]):
        steps += [(equal, 0, 4, number), (load, 0, 0, 16), (test, 1, 0, value),
                  (answer, 0, 0, deny), (answer, 0, 0, allow)]
    steps.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    check(libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0))
os.write(job["ready"], b"+")              # all layers are on: what fails from now on is the program
os.close(job["ready"])

if not job["checked"]:
    os.close(orders_file)
sys.argv = ["program.py"]
name = "program" if job["checked"] else "__main__"    # a demonstration is no part of a check
sys.modules[name] = types.ModuleType(name)
names = vars(sys.modules[name])
try:
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    exec(compile(source, "program.py", "exec"), names)
    if job["checked"]:                       # its test or a call of its function, then the number
        with os.fdopen(orders_file, "r+", encoding="utf-8") as file:
            orders, value = json.load(file), None
            if "test" in orders:
                exec(compile(orders["test"], "test.py", "exec"), names)
            else:
                holder = names["Solution"]() if "Solution" in names else None
                function = getattr(holder, orders["function"], None) or names[orders["function"]]
                value = function(*orders["arguments"])
            value = json.dumps(value, default=lambda thing: thing.tolist())
            file.seek(0)
            file.truncate()
            file.write(orders["nonce"] + value)
        sys.stdout.flush()
        os._exit(0)                          # no thread and no atexit can change it now
except MemoryError:
    os.write(2, b"MemoryError: more than the allowed memory\\n")
    os._exit(job["out_of_memory"])
except Exception as problem:                 # shown without our own line of the traceback
    traceback.print_exception(type(problem), problem, problem.__traceback__.tb_next)
    sys.exit(1)
'''


class SandboxError(RuntimeError):
    """The sandbox itself did not start. This says nothing about the program."""


@dataclass
class Run:
    """How a program ended. status: ok | error (an exception, an exit code other than 0) | timeout |
    memory (it raised MemoryError) | killed (by a signal, its own or the kernel's)."""
    status: str
    stdout: str
    stderr: str
    seconds: float
    value: object = None           # call_function only


# ---- python in a sandbox ------------------------------------------------------------------------

def run_python(code, stdin="", timeout_s=10, memory_mb=MEMORY_MB):
    """Run `code` as a script (`__main__`) in the sandbox -> Run. Thread-safe.

    timeout_s is wall time. memory_mb bounds the program's data; the address space may be
    FOR_PYTHON_MB larger, because libraries reserve more than they use. Output is cut at OUTPUT_CAP
    bytes, and bytes that are no text become U+FFFD. All processes that the program started are gone
    on return (without pid namespace and seccomp: those in its process group). Raises SandboxError
    if the sandbox does not start."""
    return confined_run(code, stdin, timeout_s, memory_mb, sandbox_layers())


def passes(code, test, timeout_s=10):
    """Run `code`, then `test` in the same namespace -> Run; status ok = both ran to their ends.

    The program runs as an imported module, so `if __name__ == "__main__"` is false in it."""
    return confined_run(code, "", timeout_s, MEMORY_MB, sandbox_layers(), {"test": test})


def call_function(code, function, arguments, timeout_s=6):
    """Solution().function(*arguments) or function(*arguments) of `code` -> Run with `value`.

    Arguments and value go through JSON: a tuple comes back as a list, an array as lists. A value
    that JSON cannot hold, or of more than OUTPUT_CAP bytes, is an error."""
    orders = {"function": function, "arguments": arguments}
    return confined_run(code, "", timeout_s, MEMORY_MB, sandbox_layers(), orders)


def confined_run(code, stdin, timeout_s, memory_mb, layers, orders=None):
    """Run one program under the given layers, and then what `orders` (a dict) say -> Run.

    With orders, the status is ok only if our own code gave the random number (nonce) back."""
    nonce = secrets.token_hex(16)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="sandbox-")
        # rm, because shutil.rmtree fails on very deep folders. chmod first opens locked ones.
        stack.callback(subprocess.run, ["rm", "-rf", folder], check=True)
        stack.callback(subprocess.run, ["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        Path(folder, "program.py").write_bytes(code.encode("utf-8", "replace"))
        # Files and not pipes, because nobody has to read or write them while the program runs.
        given, proof, out, err, ready = files = [stack.enter_context(tempfile.TemporaryFile())
                                                for _ in range(5)]
        orders_text = json.dumps({**(orders or {}), "nonce": nonce})
        for file, text in ((given, stdin), (proof, orders_text)):
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
        job = {"layers": layers, "seconds": int(timeout_s) + 2, "checked": bool(orders),
               "memory": (memory_mb + FOR_PYTHON_MB) << 20, "out_of_memory": OUT_OF_MEMORY,
               "calls": SYSTEM_CALLS.get(platform.machine()), "orders_file": proof.fileno(),
               "ready": ready.fileno()}      # holds no secret: every process can read it
        command = [sys.executable, "-I", "-c", LAUNCHER, json.dumps(job)]
        options = [option for layer in layers for option in UNSHARE.get(layer, ())]
        if options:
            unshare = shutil.which("unshare") or "unshare"
            command = [unshare, "--user", "--map-current-user", *options, *command]
        process = subprocess.Popen(
            command, stdin=given, stdout=out, stderr=err, cwd=folder, start_new_session=True,
            pass_fds=(proof.fileno(), ready.fileno()),
            # numpy reserves memory for each thread, on 64 cores more than the limit: one thread.
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder,
                 "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        in_time = wait_and_end(process, timeout_s, "pid namespace" in layers)
        seconds = time.monotonic() - start
        _, given_back, stdout, stderr, started = map(read_output, files)
    if not started:
        raise SandboxError(f"the sandbox did not start: {stderr.strip()[-300:]}")
    ended = {0: "ok", OUT_OF_MEMORY: "memory", -signal.SIGXCPU: "timeout"}.get(
        process.returncode, "error" if process.returncode > 0 else "killed")
    run = Run(ended if in_time else "timeout", stdout, stderr, seconds)
    if orders and run.status == "ok":
        try:
            value = given_back.removeprefix(nonce) if given_back.startswith(nonce) else ""
            run.value = json.loads(value)
        except (ValueError, RecursionError) as problem:    # it ended early, or made up a value
            run.status, run.stderr = "error", f"{run.stderr}\n[no result: {problem}]"
    return run


def wait_and_end(process, timeout_s, namespaced):
    """Wait for a process and end all that it started -> whether it ended in time."""
    try:
        process.wait(timeout_s)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        # If the first process of a namespace is killed, all others in it end too. Its parent,
        # unshare, ends after them. So we kill that first process, unless it has ended meanwhile.
        with contextlib.suppress(OSError, ValueError):
            if namespaced and process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                os.kill(int(children.read_text()), signal.SIGKILL)
                process.wait()
        with contextlib.suppress(ProcessLookupError):     # raised when nobody is left in its group
            for _ in range(50):                           # zombies may stay in it: give up then
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.005)
        process.wait()


def read_output(file):
    """What a program wrote, as a text: U+FFFD for nulls and for bytes that are no text."""
    written = os.pread(file.fileno(), OUTPUT_CAP + 1, 0)
    text = written[:OUTPUT_CAP].decode("utf-8", "replace").replace("\0", "\ufffd")
    return text + "\n[output cut here]" if len(written) > OUTPUT_CAP else text


@functools.cache
def sandbox_layers():
    """Names of the LAYERS that work on this machine, found out once by trying them.

    A layer counts if a small program (it loads numpy, if that is installed) prints the same with
    it as without it. Where neither namespaces nor landlock work, this process makes itself
    undumpable, because a program of the same user could else read our environment in /proc."""
    def printed(layers):
        code = "import importlib.util as u\nprint(u.find_spec('numpy') and __import__('numpy'))"
        try:
            run = confined_run(code, "", 30, MEMORY_MB, layers)
        except (SandboxError, OSError):
            return None                        # the layer is not there
        return run.stdout if run.status == "ok" else None

    active, bare = [], printed([])
    for name in LAYERS:
        if bare and printed([*active, name]) == bare:
            active.append(name)
    if bare and not {"pid namespace", "landlock"} & set(active):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)     # PR_SET_DUMPABLE; no core dumps, no debugger
    return tuple(active)


def require_sandbox(allow_unsafe=False):
    """Print which layers work and what each missing one means. Scripts call this at their start.

    Raises ValueError where not even process limits work, unless `allow_unsafe`."""
    layers = sandbox_layers()
    if "process limits" not in layers and not allow_unsafe:
        raise ValueError("model-written python cannot be confined on this machine (no process "
                         "limits; Linux has them): --allow_unsafe_code tries it all the same")
    print(f"sandbox: {', '.join(layers) or 'none'}", flush=True)
    for name, risk in LAYERS.items():
        if name not in layers:
            print(f"sandbox WITHOUT {name}: a program can {risk}", flush=True)
    return layers
