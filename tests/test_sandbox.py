"""The sandbox against hostile programs.

A hostile program prints DONE IT where it has reached its aim. If it failed for another reason, its
stderr shows that. Each program runs under every set of layers that should stop it, so that one
layer does not hide that another is broken. If a machine lacks a layer, the test is skipped and says
so.
"""
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PROJECT

from support import sandbox
from support.sandbox import (SandboxError, call_function, passes, require_sandbox, run_python,
                             sandbox_layers)

SECRET = "tvly-secret-0123456789"
# tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
SIGNALLING = (200, 234, 129, 297) if platform.machine() == "x86_64" else (130, 131, 138, 240)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


# ---- what programs must leave alone -------------------------------------------------------------

class Outside:
    """What no program may touch: a secret file, a process with a secret, and listeners."""

    def __init__(self, folder):
        self.folder = folder
        self.sandboxes = folder / "sandboxes"
        self.sandboxes.mkdir()
        self.file = folder / "secret.txt"
        self.file.write_text(SECRET)
        self.before = self.file.stat()
        self.victim = subprocess.Popen(["sleep", "600"], env={"TAVILY_API_KEY": SECRET})
        self.limits = resource.prlimit(self.victim.pid, resource.RLIMIT_CPU)
        self.nice = os.getpriority(os.PRIO_PROCESS, self.victim.pid)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0sandbox-test-{os.getpid()}")
        self.abstract.listen()
        self.named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.named.bind(str(folder / "socket"))
        for listener in (self.tcp, self.udp, self.abstract, self.named):
            listener.setblocking(False)

    def fill(self, code):
        """The code with what it is to attack in place of <NAMES>."""
        for name, value in {"SECRET_FILE": str(self.file), "OUTSIDE": str(self.folder),
                            "VICTIM": self.victim.pid, "TCP": self.tcp.getsockname()[1],
                            "UDP": self.udp.getsockname()[1], "SECRET": SECRET,
                            "ABSTRACT": f"\0sandbox-test-{os.getpid()}",
                            "SOCKET_FILE": str(self.folder / "socket"),
                            "SIGNALLING": SIGNALLING}.items():
            code = code.replace(f"<{name}>", repr(value))
        return code

    def check(self):
        """Nothing was changed, nothing was reached, and nothing was left behind."""
        now = self.file.stat()
        assert self.file.read_text() == SECRET
        assert (now.st_mode, now.st_mtime_ns) == (self.before.st_mode, self.before.st_mtime_ns)
        names = sorted(path.name for path in self.folder.iterdir())
        assert names == ["sandboxes", "secret.txt", "socket"]
        assert self.victim.poll() is None
        assert resource.prlimit(self.victim.pid, resource.RLIMIT_CPU) == self.limits
        assert os.getpriority(os.PRIO_PROCESS, self.victim.pid) == self.nice
        for listener in (self.tcp, self.abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()
        for listener in (self.udp, self.named):
            with pytest.raises(BlockingIOError):
                listener.recv(1)
        self.nothing_left()

    def nothing_left(self):
        """No folder and no process is left. What a program starts inherits HOME, a folder of ours,
        by which we know it. What was killed may need a moment to go."""
        assert list(self.sandboxes.iterdir()) == []
        late = time.monotonic() + 2
        while self.processes_left() and time.monotonic() < late:
            time.sleep(0.02)
        assert self.processes_left() == []

    def processes_left(self):
        left = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(self.sandboxes).encode() in file.read_bytes():
                    left.append((file.parent / "cmdline").read_bytes()[-200:])
            except OSError:
                continue               # gone meanwhile, or another user's
        return left

    def close(self):
        for listener in (self.tcp, self.udp, self.abstract, self.named):
            listener.close()
        if shutil.which("chattr"):     # should a program have made something immutable
            subprocess.run(["chattr", "-R", "-i", self.sandboxes], capture_output=True)
        self.victim.kill()
        self.victim.wait()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    there = Outside(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(there.sandboxes))
    yield there
    there.close()


LIMITS, ROOT, SPACES, LANDLOCK, SECCOMP = sandbox.LAYERS
SETS = {"all": tuple(sandbox.LAYERS), "no seccomp": (LIMITS, ROOT, SPACES, LANDLOCK),
        "no landlock": (LIMITS, ROOT, SPACES, SECCOMP),
        "no namespaces": (LIMITS, ROOT, LANDLOCK, SECCOMP), "limits": (LIMITS,),
        "capabilities": (LIMITS, ROOT), "namespaces": (LIMITS, SPACES),
        "landlock": (LIMITS, LANDLOCK), "seccomp": (LIMITS, SECCOMP)}

# name -> (the layers of which any one stops it, the program)
HOSTILE = {
    "own environment": ((LIMITS,), """
import os
if any('tvly' in value for value in os.environ.values()): print('DONE IT')"""),
    "environments of others": ((SPACES, LANDLOCK), """
import glob
for file in glob.glob('/proc/[0-9]*/environ') + ['/proc/%d/environ' % <VICTIM>]:
    try:
        if <SECRET> in open(file).read(): print('DONE IT')
    except OSError: pass"""),
    "a secret file": ((LANDLOCK,), "print('DONE IT', open(<SECRET_FILE>).read())"),
    "a secret file by links": ((LANDLOCK,), """
import os
for link in (os.symlink, os.link):
    try:
        link(<SECRET_FILE>, 'here' + link.__name__)
        print('DONE IT', open('here' + link.__name__).read())
    except OSError as problem: print(problem)"""),
    "the list of a folder": ((LANDLOCK,), "import os\nprint('DONE IT', os.listdir(<OUTSIDE>))"),
    "the parent's memory": ((SPACES, LANDLOCK), """
open('/proc/%d/mem' % <VICTIM>, 'rb')
print('DONE IT')"""),
    "writing outside": ((LANDLOCK,), "open(<OUTSIDE> + '/planted', 'w')\nprint('DONE IT')"),
    "writing to /dev/shm": ((LANDLOCK,), "open('/dev/shm/planted', 'w')\nprint('DONE IT')"),
    "removing outside": ((LANDLOCK,), "import os\nos.remove(<SECRET_FILE>)\nprint('DONE IT')"),
    "renaming outside": ((LANDLOCK,),
                         "import os\nos.rename(<SECRET_FILE>, 'it')\nprint('DONE IT')"),
    "truncating outside": ((LANDLOCK, SECCOMP),
                           "import os\nos.truncate(<SECRET_FILE>, 0)\nprint('DONE IT')"),
    "modes outside": ((SECCOMP,), "import os\nos.chmod(<SECRET_FILE>, 0o777)\nprint('DONE IT')"),
    "times outside": ((SECCOMP,), "import os\nos.utime(<SECRET_FILE>, (1, 1))\nprint('DONE IT')"),
    "owners outside": ((SECCOMP,), """
import os
os.chown(<SECRET_FILE>, os.getuid(), os.getgid())
print('DONE IT')"""),
    "attributes outside": ((SECCOMP,), """
import os
os.setxattr(<SECRET_FILE>, 'user.it', b'1')
print('DONE IT')"""),
    "a connection": ((SPACES, SECCOMP), """
import socket
socket.create_connection(('127.0.0.1', <TCP>), timeout=1)
print('DONE IT')"""),
    "a connection by ctypes": ((SPACES, SECCOMP), """
import ctypes, socket, struct
libc = ctypes.CDLL(None)
line = libc.socket(2, 1, 0)
address = struct.pack('=HHI8x', 2, socket.htons(<TCP>), socket.htonl(0x7f000001))
if line >= 0 and libc.connect(line, address, 16) == 0: print('DONE IT')"""),
    "a datagram": ((SPACES, SECCOMP), """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', <UDP>))
print('DONE IT')"""),
    "an abstract socket": ((SPACES, SECCOMP), """
import socket
socket.socket(socket.AF_UNIX).connect(<ABSTRACT>)
print('DONE IT')"""),
    "killing a process": ((SPACES, SECCOMP), """
import os, signal
os.kill(<VICTIM>, signal.SIGKILL)
print('DONE IT')"""),
    "killing by other calls": ((SPACES, SECCOMP), """
import ctypes
libc = ctypes.CDLL(None)
numbers = <SIGNALLING>
info = ctypes.create_string_buffer(b'\\x09' + b'\\0' * 127)
libc.syscall(numbers[0], <VICTIM>, 9)
libc.syscall(numbers[1], <VICTIM>, <VICTIM>, 9)
libc.syscall(numbers[2], <VICTIM>, 9, info)
libc.syscall(numbers[3], <VICTIM>, <VICTIM>, 9, info)
handle = libc.syscall(434, <VICTIM>, 0)
libc.syscall(424, handle, 9, None, 0)"""),
    "killing its group": ((LIMITS,), """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGKILL)"""),
    # Signal 0 only asks whether one may: should a layer fail, the machine survives this test.
    "killing all": ((SPACES, SECCOMP), "import os\nos.kill(-1, 0)\nprint('DONE IT')"),
    "killing its parent": ((SPACES, SECCOMP), """
import os
if os.getppid():
    os.kill(os.getppid(), 0)
    print('DONE IT')"""),
    "limits of others": ((SPACES, SECCOMP), """
import resource
resource.prlimit(<VICTIM>, resource.RLIMIT_CPU, (1, 1))
print('DONE IT')"""),
    "priority of others": ((SPACES, SECCOMP), """
import os
os.setpriority(os.PRIO_PROCESS, <VICTIM>, 19)
print('DONE IT')"""),
    "tracing others": ((SPACES, LANDLOCK, SECCOMP), """
import ctypes
if ctypes.CDLL(None).ptrace(0x4206, <VICTIM>, 0, 0) == 0: print('DONE IT')"""),
    "a fork bomb": ((SPACES, SECCOMP), """
import os, time
for _ in range(6): os.fork()
time.sleep(60)"""),
    "a fork that sleeps": ((LIMITS,), """
import os, time
os.fork()
time.sleep(60)"""),
    "a background process": ((LIMITS,), """
import subprocess
subprocess.Popen(['sleep', '60'])
print('started')"""),
    "a daemon": ((SPACES, SECCOMP), """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 100)
        time.sleep(60)
    os._exit(0)"""),
    # unshare asks the kernel to kill its child if it dies. The child can take that back.
    "outliving unshare": ((LIMITS,), """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0)
try: os.setsid()
except OSError as problem: print(problem)
time.sleep(60)"""),
    "a set-uid program": ((SECCOMP,), """
import subprocess
print(subprocess.run(['su', '-c', 'true']))
print('DONE IT')"""),
    "another process": ((SECCOMP,), """
import os
if os.fork() == 0: os._exit(0)
print('DONE IT')"""),
    "another program": ((LANDLOCK, SECCOMP), """
import os, shutil
try:
    shutil.copy('/bin/echo', 'copy')
    os.execv('copy', ['copy', 'DONE IT'])
except OSError as problem: print(problem)
os.execv('/bin/echo', ['echo', 'DONE IT'])"""),
    "rights to gain": ((LIMITS,), """
import ctypes
if ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0: print('DONE IT')"""),
    "shared memory that stays": ((SPACES, SECCOMP), """
import ctypes
ctypes.CDLL(None).shmget(0x7a11, 4096, 0o1600)"""),
    "mounting": ((LANDLOCK, SECCOMP), """
import ctypes
if ctypes.CDLL(None).mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0: print('DONE IT')"""),
    "the terminal": ((LIMITS,), "open('/dev/tty', 'w').write('x')\nprint('DONE IT')"),
    # fcntl and ioctl: a signal when a pipe has data; flags of a file that was opened for reading.
    "killing by fcntl": ((SPACES, SECCOMP), """
import fcntl, os, socket, struct
reading, writing = os.pipe()
fcntl.fcntl(reading, fcntl.F_SETOWN, <VICTIM>)
fcntl.fcntl(reading, 10, 9)
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
os.write(writing, b'x')"""),
    "killing by ioctl": ((SPACES, SECCOMP), """
import fcntl, os, socket, struct
reading, writing = socket.socketpair()
fcntl.ioctl(reading, 0x8901, struct.pack('i', <VICTIM>))
fcntl.fcntl(reading, 10, 9)
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
writing.send(b'x')"""),
    "flags outside": ((SECCOMP,), """
import array, fcntl
flags = array.array('l', [0])
with open(<SECRET_FILE>, 'rb') as file:
    fcntl.ioctl(file, 0x80086601, flags)
    flags[0] |= 0x40
    fcntl.ioctl(file, 0x40086602, flags)
print('DONE IT')"""),
    "the version outside": ((SECCOMP,), """
import array, fcntl
with open(<SECRET_FILE>, 'rb') as file: fcntl.ioctl(file, 0x40087602, array.array('l', [7]))
print('DONE IT')"""),
    # Memory that has no address, so that RLIMIT_AS does not count it.
    "memory in a file": ((SECCOMP,), "import os\nos.memfd_create('it')\nprint('DONE IT')"),
    "memory in sockets": ((SECCOMP,), """
import socket
held = 0
def fill(line):
    global held
    line.setblocking(False)
    try:
        line.setsockopt(socket.SOL_SOCKET, 32, 1 << 26)
    except OSError: pass
    try:
        while held < 1 << 26: held += line.send(bytes(65536))
    except BlockingIOError: pass
carrier = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
for i in range(100):
    pair = socket.socketpair()
    fill(pair[0]), fill(pair[1])
    socket.send_fds(carrier[0], [b'x'], [pair[0].fileno(), pair[1].fileno()])
    if held >= 1 << 26: print('DONE IT')"""),
    "memory in pipes": ((SECCOMP,), """
import fcntl, os
fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)
print('DONE IT')"""),
    # What others do in a folder, without the right to list it.
    "names by inotify": ((SECCOMP,), """
import ctypes
libc = ctypes.CDLL(None)
handle = libc.inotify_init()
if libc.inotify_add_watch(handle, <OUTSIDE>.encode(), 0x100) >= 0: print('DONE IT')"""),
    "names by fanotify": ((SECCOMP,), """
import ctypes
libc = ctypes.CDLL(None)
handle = libc.fanotify_init(0xc00, 0)
place = <OUTSIDE>.encode()
if handle >= 0 and libc.fanotify_mark(handle, 1, ctypes.c_uint64(0x100), -100, place) == 0:
    print('DONE IT')"""),
    "a socket with a path": ((SECCOMP,), """
import socket
path = <SOCKET_FILE>
for send in (lambda line: line.sendto(b'x', path), lambda line: line.connect(path),
             lambda line: line.sendmsg([b'x'], [], 0, path)):
    try:
        send(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0])
        print('DONE IT')
    except OSError as problem: print(problem)"""),
    # What only root may do. To the clock and to the host, the programs give what they have.
    "an immutable file": ((ROOT, SPACES, SECCOMP), """
import array, fcntl
with open('it', 'w') as file:
    flags = array.array('l', [0])
    fcntl.ioctl(file, 0x80086601, flags)
    flags[0] |= 0x10
    fcntl.ioctl(file, 0x40086602, flags)
print('DONE IT')"""),
    "the clock": ((ROOT, SPACES, SECCOMP), """
import time
time.clock_settime(time.CLOCK_REALTIME, time.time())
print('DONE IT')"""),
    "the host's name": ((ROOT, SPACES, SECCOMP), """
import socket
socket.sethostname(socket.gethostname())
print('DONE IT')"""),
    "a device of its own": ((ROOT, SPACES, LANDLOCK, SECCOMP), """
import os, stat
os.mknod('disk', 0o600 | stat.S_IFBLK, os.stat('.').st_dev)
print('DONE IT')"""),
    "lifting its limits": ((ROOT, SPACES), """
import resource
for most in (1 << 30, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
print('DONE IT')"""),
    # The numbers of 32-bit calls are others: here 20 is getpid. (mov eax, 20; int 0x80; ret)
    "calls of another machine": ((SECCOMP,), """
import ctypes, mmap, platform
if platform.machine() == 'x86_64':
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    print('DONE IT')"""),
    "wiping all its files": ((LIMITS,), """
import os
for file in range(64):
    try:
        os.ftruncate(file, 0)
        os.lseek(file, 0, 0)
        os.write(file, b'it did not start')
    except OSError: pass"""),
    "output that cannot be read": ((LIMITS,), """
import fcntl, os
print(1, flush=True)
for file in range(64):
    try: fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
    except OSError: pass"""),
}


def cases():
    """Each program with each set of layers that has one to stop it."""
    for name, (stopping, _) in HOSTILE.items():
        for set_name, layers in SETS.items():
            if set(stopping) & set(layers):
                yield pytest.param(name, set_name, id=f"{name} - {set_name}")


def use_layers(monkeypatch, set_name, stopping=(LIMITS,)):
    """Make the sandbox use this set of layers. If this machine lacks a layer of it, the test is
    skipped, and the skip says so."""
    active = sandbox_layers()
    chosen = [layer for layer in SETS[set_name] if layer in active]
    missing = [layer for layer in SETS[set_name] if layer not in active]
    if not set(stopping) & set(chosen) or missing and set_name != "all":
        pytest.skip(f"this machine has no {', '.join(missing)}")
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: tuple(chosen))


@pytest.mark.parametrize("name, set_name", list(cases()))
def test_hostile_program(name, set_name, outside, monkeypatch, tmp_path_factory):
    """It reaches nothing, harms nothing, leaves nothing behind, and gets no pass."""
    stopping, code = HOSTILE[name]
    use_layers(monkeypatch, set_name, stopping)
    if ROOT in stopping and "DONE IT" not in in_the_open(code, tmp_path_factory.mktemp("it")):
        pytest.skip("the rights of this user are not enough for it, sandbox or not")
    monkeypatch.setenv("TAVILY_API_KEY", SECRET)
    run = run_python(outside.fill(code), timeout_s=1)
    assert "DONE IT" not in run.stdout and SECRET not in run.stdout + run.stderr
    assert run.seconds < 20                # it was stopped, not waited for
    outside.check()
    shared = Path("/proc/sysvipc/shm")
    assert not shared.exists() or "0x00007a11" not in shared.read_text()
    assert not Path("/dev/shm/planted").exists()


def in_the_open(code, folder):
    """What a program prints in a plain interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=folder, text=True)
    if shutil.which("chattr"):         # what it made immutable can be removed again
        subprocess.run(["chattr", "-R", "-i", folder], capture_output=True)
    return done.stdout + done.stderr


# Programs that reach their aim in a plain interpreter. (The others need rights or a terminal.)
WORKING = ["environments of others", "a secret file", "a secret file by links", "writing outside",
           "truncating outside", "modes outside", "times outside", "a connection",
           "a connection by ctypes", "a datagram", "an abstract socket", "killing a process",
           "killing by other calls", "killing all", "killing its parent", "limits of others",
           "priority of others", "killing by fcntl", "killing by ioctl", "flags outside",
           "the version outside", "memory in a file", "memory in pipes", "names by inotify",
           "a socket with a path", "another process", "another program", "rights to gain"]
if os.geteuid() == 0:
    WORKING += ["memory in sockets", "names by fanotify"]


@pytest.mark.parametrize("name", WORKING)
def test_hostile_program_works_without_a_sandbox(name, outside):
    """If it also failed without a sandbox, its failing in the sandbox would prove nothing."""
    printed = in_the_open(outside.fill(HOSTILE[name][1]), outside.sandboxes)
    if "Inappropriate ioctl" in printed or "not supported" in printed:
        pytest.skip(f"the file system of {outside.folder} has no such flags")
    assert "DONE IT" in printed or outside.victim.wait(5) == -signal.SIGKILL, printed


# ---- programs that want a pass ------------------------------------------------------------------

CODE = "def add(a, b):\n    return a + b\n"
TEST = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
WRONG = "def add(a, b):\n    return a - b\n"

CHEATS = {
    "prints a verdict": "print('ok PASSED 2 passed in 0.01s\\nOK')",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "raise SystemExit": "raise SystemExit",
    "os._exit(0)": "import os\nos._exit(0)",
    "exits in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "SystemExit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "excepthook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)",
    "a thread that exits": "import threading, os\nthreading.Timer(.05, os._exit, [0]).start()\n"
                           "def add(a, b):\n    import time\n    time.sleep(9)",
    "kills itself": "import os\nos.kill(os.getpid(), 9)\nos.abort()",
    "kills its group": "import os\nos.killpg(0, 9)",
    "closes all files": "import os\nos.closerange(0, 256)\nos._exit(0)",
    "writes to all files": "import os\nfor file in range(1, 64):\n"
                           "    try: os.write(file, b'0' * 32 + b'5')\n"      # a nonce, guessed
                           "    except OSError: pass\nos._exit(0)",
    "forks": "import os\nif os.fork(): os._exit(0)",
    "a parent that exits": "import os\ndef add(a, b):\n    if os.fork(): os._exit(0)\n    return 1",
    "no output any more": "import sys\nsys.stdout = sys.stderr = None",
    "deletes its folder": "import shutil\nshutil.rmtree('.', ignore_errors=True)",
    "its own test.py": "open('test.py', 'w').write('')",
    "endless": "while True: pass",
    "recursion": "def add(a, b):\n    return add(a, b)",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\n"
                                 "def add(a, b):\n    return add(b, a)",
    "memory": "held = []\nwhile True: held.append(bytearray(10**8))",
    "null bytes": "print(1)\0",
    "no python": "Sure! Here is the function:",
    "nothing": "",
    "200 kB": "x = '" + "a" * 200_000 + "'",
}


@pytest.mark.parametrize("name, set_name", [(name, "all") for name in CHEATS] + [
    (name, "limits") for name in CHEATS if "exit" in name or "fork" in name or "file" in name])
def test_no_pass_for_a_cheat(name, set_name, outside, monkeypatch):
    """The function is wrong or missing. So the program must not pass, whatever else it does."""
    use_layers(monkeypatch, set_name)
    code = CHEATS[name] if "def add" in CHEATS[name] else WRONG + CHEATS[name]
    run = passes(code, TEST, timeout_s=0.6)
    assert run.status != "ok", run
    called = call_function(code, "add", [2, 3], timeout_s=0.6)
    assert called.status != "ok" or called.value != 5, called
    if not (set_name == "limits" and "fork" in name + code):
        outside.nothing_left()


@pytest.mark.parametrize("set_name", SETS)
def test_a_right_program_passes(set_name, outside, monkeypatch):
    """The test script uses numpy, as those of MBPP+ do. A wrong program fails the same script."""
    use_layers(monkeypatch, set_name)
    test = "import numpy as np\nassert np.allclose(add(np.ones(3), 1), 2)\n" + TEST
    run = passes(CODE, test)
    assert run.status == "ok", run
    run = passes(WRONG, test)
    assert run.status == "error" and "AssertionError" in run.stderr
    outside.check()


def test_what_a_check_lets_be():
    """Threads that never end, a demonstration, closed output and noise are no reason to fail."""
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    demonstration = "if __name__ == '__main__':\n    print(add(*input().split()))\n"
    closed = "import sys\nsys.stdin.close()\n"
    for more in (thread, demonstration, closed, "print('x' * 300_000)\n"):
        run = passes(CODE + more, TEST)
        assert run.status == "ok" and run.seconds < 20, run


def test_call_function_gives_the_value_back():
    """The value travels through JSON. A method of Solution comes before a plain function."""
    method = "class Solution:\n    def add(self, a, b): return [a + b, {'k': None}]\n" + WRONG
    assert call_function(method, "add", [1, 2]).value == [3, {"k": None}]
    assert call_function("class Solution: pass\n" + CODE, "add", [1, 2]).value == 3
    assert call_function(CODE, "add", ["ä\ud800", "\0"]).status in ("ok", "error")
    assert call_function(CODE, "add", ["ä", "\n"]).value == "ä\n"
    assert call_function(CODE, "add", [[0] * 200_000, [1]]).value == [0] * 200_000 + [1]
    array = "import numpy\ndef add(a, b):\n    return numpy.array([a, b])"
    assert call_function(array, "add", [1, 2]).value == [1, 2]
    assert call_function("def add(a, b):\n    return (a, b)", "add", [1, 2]).value == [1, 2]
    for code in ("def add(a, b):\n    return {1, 2}", "def add(a, b):\n    return add", "",
                 "def add(a):\n    return a",
                 "def add(a, b):\n    print('3')\n    raise SystemExit",
                 "def add(a, b):\n    x = []\n    for _ in range(9000): x = [x]\n    return x",
                 "def add(a, b):\n    return 10 ** 9000"):
        run = call_function(code, "add", [1, 2])
        assert (run.status, run.value) == ("error", None), run


# ---- what a program may do, and how it ends -----------------------------------------------------

@pytest.mark.parametrize("code, status, stdout", [
    ("print(6 * 7)", "ok", "42\n"),
    ("print(input() + '!')", "ok", "in ä!\n"),
    ("import sys\nprint(sys.stdin.read().split(), __name__)", "ok", "['in', 'ä'] __main__\n"),
    ("print(open(0).read())", "ok", "in ä\n\n"),
    ("open('a', 'w').write('x')\nprint(open('a').read(), sorted(__import__('os').listdir()))", "ok",
     "x ['a', 'program.py']\n"),
    ("import threading\nthread = threading.Thread(target=print, args=(1,))\nthread.start()", "ok",
     "1\n"),
    ("import atexit\natexit.register(print, 'end')", "ok", "end\n"),
    ("raise SystemExit(0)", "ok", ""),
    ("import sys\nprint(1)\nsys.exit(3)", "error", "1\n"),
    ("import os\nos._exit(113 + 1)", "error", ""),
    ("print(1)\n1 / 0", "error", "1\n"),
    ("def f(): f()\nf()", "error", ""),
    ("print(", "error", ""),
    ("import sys\nsys.stdout.buffer.write(b'a\\xff\\x00b')", "ok", "a\ufffd\ufffdb"),
    ("import os\nos.close(1)\nos.close(2)\nprint(5)", None, ""),
    ("import ctypes\nctypes.string_at(0)", "killed", ""),
    ("import time\ntime.sleep(60)", "timeout", ""),
    ("import signal, time\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, 1)\n"
     "while True: pass", "timeout", ""),
    ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "timeout",
     ""),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(60)",
     "timeout", ""),
    ("x = bytearray(3 << 30)", "memory", ""),
    ("import numpy\nnumpy.ones(1 << 29)", "memory", ""),
    ("import numpy\nprint(numpy.ones(100 << 17).sum())", "ok", "13107200.0\n"),      # 100 MB
])
def test_how_a_program_ends(code, status, stdout, outside):
    run = run_python(code, stdin="in ä\n", timeout_s=1 if status == "timeout" else 20)
    assert status is None or run.status == status, run
    assert run.stdout == stdout
    assert status != "timeout" or run.stderr == ""      # what it printed, not what unshare says
    assert run.seconds < 20
    outside.check()


def test_a_start_that_takes_too_long_is_a_timeout(outside):
    """On a machine that is too busy, too: the sandbox is not broken, so it raises nothing."""
    assert run_python("print(1)", timeout_s=0.001).status == "timeout"
    assert passes(CODE, TEST, timeout_s=0.001).status == "timeout"
    outside.check()


ORDINARY = {
    "asyncio": """
import asyncio
async def wait():
    await asyncio.sleep(.01)
    return await asyncio.to_thread(sum, [2, 3])
print(asyncio.run(wait()))""",
    "sqlite": """
import sqlite3
base = sqlite3.connect('base')
base.execute('create table numbers (n)')
base.execute('insert into numbers values (5)')
base.commit()
print(*base.execute('select n from numbers').fetchone())""",
    "temporary files": """
import shutil, tempfile
with tempfile.TemporaryDirectory() as folder:
    with open(folder + '/a', 'w') as file: file.write('5')
    shutil.move(folder + '/a', 'b')
    shutil.copyfile('b', 'c')
    print(open('c').read())""",
    "an alarm": """
import signal, time
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, .05)
try: time.sleep(60)
except TimeoutError: print(5)""",
    "a thread with a large stack": """
import resource, sys, threading
resource.setrlimit(resource.RLIMIT_STACK, (1 << 26, resource.getrlimit(resource.RLIMIT_STACK)[1]))
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 27)
def deep(n): return deep(n - 1) if n else 5
threading.Thread(target=lambda: print(deep(30_000))).start()""",
    "pipes and selectors": """
import os, selectors
reading, writing = os.pipe()
copy = os.dup(writing)
with selectors.DefaultSelector() as selector:
    selector.register(reading, selectors.EVENT_READ)
    os.write(copy, b'5')
    print(os.read(selector.select(5)[0][0].fd, 9).decode())""",
    "many modules": """
import os, platform, random, secrets, time, uuid, zipfile
platform.platform(), uuid.uuid4(), secrets.token_hex(), random.random(), os.cpu_count()
time.localtime(), time.process_time(), os.times()
with zipfile.ZipFile('z', 'w') as file: file.writestr('a', '5')
print(zipfile.ZipFile('z').read('a').decode())""",
    "numpy": """
import numpy as np
square = np.random.rand(200, 200)
np.save('a.npy', np.linalg.inv(square) @ square)
print(5 * np.allclose(np.load('a.npy', mmap_mode='r'), np.eye(200)))""",
}


@pytest.mark.parametrize("set_name", ["limits", "all"])
@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_program_works(name, set_name, monkeypatch):
    use_layers(monkeypatch, set_name)
    run = run_python(ORDINARY[name], timeout_s=20)
    assert (run.status, run.stdout, run.stderr) == ("ok", "5\n", ""), run


def test_memory_is_about_data():
    """200 MB fit into 256, and not into 64 together with what python itself may take. A program
    that leaves no memory at all, not even for a traceback, is told as such."""
    code = "x = bytearray(%d << 20)\nprint(len(x))"
    assert run_python(code % 200, memory_mb=256).status == "ok"
    assert run_python(code % (200 + sandbox.FOR_PYTHON_MB), memory_mb=64).status == "memory"
    run = run_python("x = []\nwhile True: x.append(str(len(x)))", timeout_s=60, memory_mb=1)
    assert run.status == "memory" and "MemoryError" in run.stderr


def test_a_check_may_take_four_gigabytes():
    """As in evalplus. numpy.empty takes addresses, and memory only where somebody writes."""
    code = "import numpy\nx = numpy.empty(%d << 30, 'u1')\ndef size():\n    return x.size"
    assert passes(code % 3, "assert size() == 3 << 30").status == "ok"
    assert call_function(code % 3, "size", []).value == 3 << 30
    assert passes(code % 5, "").status == "memory"


def test_output_and_files_are_bounded(outside):
    """200 kB come whole. 20 MB are cut, and the cut is marked. An endless writer gets an error."""
    run = run_python("print('é' * 100_000)")
    assert run.status == "ok" and run.stdout == "é" * 100_000 + "\n"
    run = run_python("import sys\nsys.stdout.write('x' * 20_000_000)")
    assert run.status == "ok"
    assert run.stdout == "x" * sandbox.OUTPUT_CAP + "\n[output cut here]"
    run = run_python("while True: print('x' * 1_000_000)", timeout_s=5)
    assert run.status == "error" and "too large" in run.stderr and len(run.stdout) < 9_000_000
    run = run_python("big = open('big', 'wb')\nwhile True: big.write(bytes(1 << 20))", timeout_s=5)
    assert run.status == "error" and "too large" in run.stderr
    outside.check()


@pytest.mark.parametrize("set_name", ["limits", "all"])
@pytest.mark.parametrize("code", [
    "import os\nos.mkdir('a', 0)\nos.mkdir('b')\nopen('b/c', 'w')\nos.chmod('b', 0)",
    "import os\nfor _ in range(1100):\n    os.mkdir('a')\n    os.chdir('a')",
    "import os\nos.symlink('/', 'a')\nos.symlink('..', 'b')\nos.mkfifo('c')",
    "import shutil\nshutil.rmtree('.', ignore_errors=True)",
    "import os\nfor _ in range(3_000):\n    os.mkdir('a')\n    os.chdir('a')",
    "import os\nfor i in range(3_000): os.mkdir(str(i))",
])
def test_the_folder_goes_whatever_is_in_it(code, set_name, outside, monkeypatch):
    use_layers(monkeypatch, set_name)
    monkeypatch.setattr(sandbox, "CLEAN_UP_S", 100)
    run_python(code, timeout_s=3)
    outside.check()


def test_a_slow_removal_holds_up_nobody(outside, monkeypatch, tmp_path_factory):
    """We wait CLEAN_UP_S for the removal, which then goes on alone. Here rm takes 3 s."""
    slow = tmp_path_factory.mktemp("bin") / "rm"
    slow.write_text(f"#!/bin/sh\nsleep 3\nexec {shutil.which('rm')} \"$@\"\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "CLEAN_UP_S", 0.2)
    start = time.monotonic()
    assert run_python("print(5)").status == "ok"
    assert time.monotonic() - start < 2.5
    assert len(list(outside.sandboxes.iterdir())) == 1
    while list(outside.sandboxes.iterdir()) and time.monotonic() - start < 20:
        time.sleep(0.1)
    outside.check()


def test_many_threads_at_once(outside):
    """Each run gets its own output and its own verdict. Nothing is left behind."""
    def run(i):
        kind = i % 3
        if kind == 0:
            return run_python(f"import sys\nprint(sys.stdin.read() * 1000 + '{i}')", stdin=str(i))
        if kind == 1:
            return call_function(CODE, "add", [i, i])
        return passes(CODE, f"assert add({i}, 1) == {i}")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(run, range(24)))
    for i, run in enumerate(runs):
        if i % 3 == 0:
            assert run.stdout == str(i) * 1000 + f"{i}\n"
        elif i % 3 == 1:
            assert run.value == 2 * i
        else:
            assert run.status == "error" and "AssertionError" in run.stderr
    outside.check()


def test_checks_run_side_by_side():
    """Two run at a time, with numpy in each test script, as in the benchmarks."""
    test = "import numpy as np\n" + TEST * 50
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: passes(CODE, test), range(24)))
    assert all(run.status == "ok" for run in runs)


# ---- layers -------------------------------------------------------------------------------------

def test_layers_are_named_and_what_is_missing_is_said(monkeypatch, capsys):
    assert set(sandbox_layers()) <= set(sandbox.LAYERS)
    assert LIMITS in sandbox_layers()
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: (LIMITS, SECCOMP))
    assert require_sandbox() == (LIMITS, SECCOMP)
    printed = capsys.readouterr().out
    assert "sandbox: process limits, seccomp (" in printed
    assert "WITHOUT landlock: a program can open, list, write or remove your files\n" in printed
    assert "WITHOUT namespaces, landlock: a program can read the env" in printed
    assert "seccomp: a program" not in printed and "limits: a program" not in printed
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: tuple(sandbox.LAYERS))
    require_sandbox()
    assert "WITHOUT" not in capsys.readouterr().out


def test_refused_without_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: ())
    with pytest.raises(ValueError, match="--allow_unsafe_code") as caught:
        require_sandbox()
    assert "\n" not in str(caught.value)
    assert require_sandbox(allow_unsafe=True) == ()
    assert run_python("print(1)").stdout == "1\n"


# What is broken -> (a text of sandbox.py, what stands there on such a machine, the layers left)
BROKEN = {
    "no user namespaces": ("UNSHARE", "false", [LIMITS, ROOT, LANDLOCK, SECCOMP]),
    "no pyseccomp": ("from pyseccomp", "from missing", [LIMITS, ROOT, SPACES, LANDLOCK]),
    "no libseccomp": ("libseccomp.so.2", "missing.so", [LIMITS, ROOT, SPACES, LANDLOCK]),
    "no package landlock": ("from landlock", "from missing", [LIMITS, ROOT, SPACES, SECCOMP]),
    "no landlock in the kernel": ("rules = Ruleset()", "raise OSError", [LIMITS, ROOT, SPACES,
                                                                         SECCOMP]),
    "no capset": ("0x20080522", "0", [LIMITS, SPACES, LANDLOCK, SECCOMP]),
    "no python": ("import ctypes", "import missing", []),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_layer_that_does_not_work_is_left_out(broken, monkeypatch):
    """It is not named, and a run that asks for it does not start."""
    available = sandbox_layers()
    old, new, expected = BROKEN[broken]
    if old == "UNSHARE":
        monkeypatch.setattr(sandbox, "UNSHARE", [new])
    else:
        assert old in sandbox.LAUNCHER
        monkeypatch.setattr(sandbox, "LAUNCHER", sandbox.LAUNCHER.replace(old, new))
    prctl = types.SimpleNamespace(prctl=lambda *_: 0)    # so that this process stays dumpable
    monkeypatch.setattr(sandbox.ctypes, "CDLL", lambda name: prctl)
    found = sandbox_layers.__wrapped__()                 # the layers are looked for anew
    assert found == tuple(layer for layer in expected if layer in available)
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: available)
    if set(available) - set(expected):
        with pytest.raises(SandboxError):
            run_python("print(1)")


CLOSED = """
from support import sandbox
real = sandbox.confined_run
def broken(code, stdin, timeout_s, memory_mb, test=None, layers=None):
    if {"namespaces", "landlock"} & set(layers or ()):
        raise sandbox.SandboxError("not on this machine")
    return real(code, stdin, timeout_s, memory_mb, test, layers)
sandbox.confined_run = broken
print(sandbox.sandbox_layers())
print(sandbox.run_python("import os; print(open('/proc/%d/environ' % os.getppid()).read())"))
"""


def test_our_environment_is_closed_without_namespaces_and_landlock():
    """Without the two, the process makes itself undumpable. That cannot be taken back, so it is
    tested in another process."""
    if os.geteuid() == 0:
        pytest.skip("root reads every environment, so nothing but those two layers can help")
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True,
                          env={**os.environ, "API_KEY": SECRET,
                               "PYTHONPATH": str(PROJECT)})
    assert "process limits" in done.stdout and "landlock" not in done.stdout, done
    assert "PermissionError" in done.stdout and SECRET not in done.stdout


def test_nothing_of_this_process_changes():
    """A run changes no limit and no mode of this process, and leaves no file open."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    before = [resource.getrlimit(getattr(resource, name)) for name in names]
    files = len(os.listdir("/proc/self/fd"))
    run_python("print(1)")
    with pytest.raises(AttributeError):
        run_python("print(1)", stdin=None)         # our own mistakes must not leave files open
    assert before == [resource.getrlimit(getattr(resource, name)) for name in names]
    assert len(os.listdir("/proc/self/fd")) == files
    if {SPACES, LANDLOCK} & set(sandbox_layers()):
        assert sandbox.ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1         # still dumpable
