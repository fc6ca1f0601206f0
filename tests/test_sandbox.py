"""The sandbox against hostile programs.

Each hostile program runs with all layers, and with each layer alone that is to stop it, so that one
layer does not hide that another is broken. Under `slow` it runs with all other sets of layers too.
If a machine lacks a layer, the test is skipped and says so.
"""
import ctypes
import os
import platform
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import refuses

from tools import sandbox
from tools.sandbox import (SandboxError, call_function, passes, require_sandbox, run_python,
                           sandbox_layers)

SECRET = "tvly-secret-0123456789"
# tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
SIGNALLING = (200, 234, 129, 297) if platform.machine() == "x86_64" else (130, 131, 138, 240)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


# ---- what programs must leave alone -------------------------------------------------------------

class Outside:
    """What no program may touch: a secret file, a process with a secret, and listeners."""

    def __init__(self, folder):
        self.folder, self.sandboxes = folder, folder / "sandboxes"
        self.sandboxes.mkdir()
        self.file = folder / "secret.txt"
        self.file.write_text(SECRET)
        self.victim = subprocess.Popen(["sleep", "600"], env={"TAVILY_API_KEY": SECRET})
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0sandbox-test-{os.getpid()}")
        self.abstract.listen()
        self.named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.named.bind(str(folder / "socket"))
        self.listeners = [self.tcp, self.udp, self.abstract, self.named]
        self.before = self.state()

    def state(self):
        """All that must stay as it is."""
        file, victim = self.file.stat(), self.victim.pid
        return (self.file.read_text(), file.st_mode, file.st_mtime_ns,
                sorted(path.name for path in self.folder.iterdir()),
                resource.prlimit(victim, resource.RLIMIT_CPU),
                os.getpriority(os.PRIO_PROCESS, victim))

    def fill(self, code):
        """The code with what it is to attack in place of <NAMES>."""
        names = {"SECRET_FILE": str(self.file), "OUTSIDE": str(self.folder),
                 "VICTIM": self.victim.pid, "TCP": self.tcp.getsockname()[1],
                 "UDP": self.udp.getsockname()[1], "SIGNALLING": SIGNALLING,
                 "ABSTRACT": f"\0sandbox-test-{os.getpid()}",
                 "SOCKET_FILE": str(self.folder / "socket")}
        return re.sub("<([A-Z_]+)>", lambda found: repr(names[found[1]]), code)

    def check(self):
        """Nothing was changed, nothing was reached, and nothing was left behind."""
        assert self.victim.poll() is None and self.state() == self.before
        reached, _, _ = select.select(self.listeners, [], [], 0)
        assert reached == []
        self.nothing_left()

    def nothing_left(self):
        """No folder and no process is left. What a program starts inherits HOME, a folder of ours,
        by which we know it. What was killed may need a moment to go."""
        assert list(self.sandboxes.iterdir()) == []
        late = time.monotonic() + 2
        while (left := self.processes_left()) and time.monotonic() < late:
            time.sleep(0.02)
        assert left == []

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
        for listener in self.listeners:
            listener.close()
        make_mutable(self.sandboxes)
        self.victim.kill()
        self.victim.wait()


def make_mutable(folder):
    """Undo what a program may have made immutable."""
    if any(folder.iterdir()) and shutil.which("chattr"):
        subprocess.run(["chattr", "-R", "-i", folder], capture_output=True)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    there = Outside(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(there.sandboxes))
    yield there
    there.close()


LIMITS, ROOT, SPACES, LANDLOCK, SECCOMP = ALL = sandbox.LAYERS
# The limits are in every set, because without them a program may harm the tests.
SETS = {"all": ALL, LIMITS: (LIMITS,),
        **{layer: (LIMITS, layer) for layer in ALL[1:]},
        **{f"no {left}": tuple(layer for layer in ALL if layer != left) for left in ALL[2:]}}


def use_layers(monkeypatch, set_name, stopping=(LIMITS,)):
    """Make the sandbox use this set of layers. If this machine lacks a layer of it, the test is
    skipped, and the skip says so."""
    active = sandbox_layers()
    chosen = [layer for layer in SETS[set_name] if layer in active]
    missing = [layer for layer in SETS[set_name] if layer not in active]
    if not set(stopping) & set(chosen) or missing and set_name != "all":
        pytest.skip(f"this machine has no {', '.join(missing)}")
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: tuple(chosen))


def case(*names, fast):
    """A test case: the name of a program, if any, and of a set of layers. It is slow, unless that
    set is among `fast`."""
    return pytest.param(*names, id=" - ".join(names),
                        marks=[] if names[-1] in fast else pytest.mark.slow)


def with_imports(code):
    """A program, and before it the import of each module of python that it uses as `name.`"""
    used = set(re.findall(r"\b(\w+)\.", code)) & sys.stdlib_module_names
    return f"import {', '.join(sorted(used))}\n{code}" if used else code


# ---- hostile programs ---------------------------------------------------------------------------

START, FILES, CALLS, OTHERS = (LIMITS,), (LANDLOCK,), (SECCOMP,), (SPACES, SECCOMP)
# name -> (the layers of which any one stops it, the program). A program has reached its aim if it
# comes to its end, where it prints DONE IT. A program that harms others in silence leaves by
# os._exit before its end, and the harm is looked for from outside. (with_imports adds imports.)
HOSTILE = {
    "own environment": (START, "assert any('tvly' in text for text in os.environ.values())"),
    "environments of others": ((SPACES, LANDLOCK), """
def tell(file):
    try: return open(file).read()
    except OSError: return ''
files = glob.glob('/proc/[0-9]*/environ') + ['/proc/%d/environ' % <VICTIM>]
assert 'tvly' in ' '.join(map(tell, files))"""),
    "a secret file": (FILES, "print(open(<SECRET_FILE>).read())"),
    "a secret file by symlink": (FILES, "os.symlink(<SECRET_FILE>, 'a')\nprint(open('a').read())"),
    "a secret file by link": (FILES, "os.link(<SECRET_FILE>, 'a')\nprint(open('a').read())"),
    "the list of a folder": (FILES, "os.listdir(<OUTSIDE>)"),
    "the memory of another": ((SPACES, LANDLOCK), "open('/proc/%d/mem' % <VICTIM>, 'rb')"),
    "writing outside": (FILES, "open(<OUTSIDE> + '/planted', 'w')"),
    "writing to /dev/shm": (FILES, "open('/dev/shm/planted', 'w')"),
    "removing outside": (FILES, "os.remove(<SECRET_FILE>)"),
    "renaming outside": (FILES, "os.rename(<SECRET_FILE>, 'it')"),
    "truncating outside": ((LANDLOCK, SECCOMP), "os.truncate(<SECRET_FILE>, 0)"),
    "modes outside": (CALLS, "os.chmod(<SECRET_FILE>, 0o777)"),
    "times outside": (CALLS, "os.utime(<SECRET_FILE>, (1, 1))"),
    "owners outside": (CALLS, "os.chown(<SECRET_FILE>, os.getuid(), os.getgid())"),
    "attributes outside": (CALLS, "os.setxattr(<SECRET_FILE>, 'user.it', b'1')"),
    "a connection": (OTHERS, "socket.create_connection(('127.0.0.1', <TCP>), timeout=1)"),
    "a connection by ctypes": (OTHERS, """
line = libc.socket(2, 1, 0)
address = struct.pack('=HHI8x', 2, socket.htons(<TCP>), socket.htonl(0x7f000001))
assert line >= 0 and libc.connect(line, address, 16) == 0"""),
    "a datagram": (OTHERS, """
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', <UDP>))"""),
    "an abstract socket": (OTHERS, "socket.socket(socket.AF_UNIX).connect(<ABSTRACT>)"),
    "killing a process": (OTHERS, "os.kill(<VICTIM>, signal.SIGKILL)"),
    "killing by other calls": (OTHERS, """
kill, kill_thread, queue, queue_thread = <SIGNALLING>
info = ctypes.create_string_buffer(b'\\x09' + b'\\0' * 127)
assert 0 in (libc.syscall(kill, <VICTIM>, 9), libc.syscall(kill_thread, <VICTIM>, <VICTIM>, 9),
             libc.syscall(queue, <VICTIM>, 9, info),
             libc.syscall(queue_thread, <VICTIM>, <VICTIM>, 9, info),
             libc.syscall(424, libc.syscall(434, <VICTIM>, 0), 9, None, 0))"""),
    "killing its group": (START, "os.killpg(0, signal.SIGKILL)\nos._exit(0)"),
    # Signal 0 only asks whether one may: should a layer fail, the machine survives this test.
    "killing all": (OTHERS, "os.kill(-1, 0)"),
    "killing its parent": (OTHERS, "assert os.getppid()\nos.kill(os.getppid(), 0)"),
    "limits of others": (OTHERS, "resource.prlimit(<VICTIM>, resource.RLIMIT_CPU, (1, 1))"),
    "priority of others": (OTHERS, "os.setpriority(os.PRIO_PROCESS, <VICTIM>, 19)"),
    "tracing others": ((SPACES, LANDLOCK, SECCOMP),
                       "assert libc.ptrace(0x4206, <VICTIM>, 0, 0) == 0"),
    "a fork bomb": (OTHERS, "for _ in range(6): os.fork()\ntime.sleep(60)"),
    "a fork that sleeps": ((LIMITS, SPACES), "os.fork()\ntime.sleep(60)"),
    "a background process": (START, "subprocess.Popen(['sleep', '60'])\nos._exit(0)"),
    "a daemon": (OTHERS, """
if os.fork(): os._exit(0)
os.setsid()
if os.fork() == 0: os.closerange(0, 100), time.sleep(60)
os._exit(0)"""),
    # unshare asks the kernel to kill its child if it dies. The child can take that back.
    "outliving unshare": ((LIMITS, SPACES), """
libc.prctl(1, 0)
try: os.setsid()
except OSError as problem: print(problem)
time.sleep(60)"""),
    "a set-uid program": (CALLS, "subprocess.run(['su', '-c', 'true'])"),
    "another process": (CALLS, "if os.fork() == 0: os._exit(0)"),
    "another program": ((LANDLOCK, SECCOMP), "os.execv('/bin/echo', ['echo', 'DONE IT'])"),
    "a program that it brings": ((LANDLOCK, SECCOMP), """
shutil.copy('/bin/echo', 'copy')
os.execv('copy', ['copy', 'DONE IT'])"""),
    "rights to gain": (START, "assert libc.prctl(39, 0, 0, 0, 0) == 0"),
    "shared memory that stays": (OTHERS, "libc.shmget(0x7a11, 4096, 0o1600)\nos._exit(0)"),
    "mounting": ((LANDLOCK, SECCOMP),
                 "assert libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0"),
    "the terminal": (START, "open('/dev/tty', 'w').write('x')"),
    # fcntl and ioctl: a signal when a pipe has data; flags of a file that was opened for reading.
    **{f"killing by {name}": (OTHERS, f"""
reading, writing = socket.socketpair()
fcntl.{name}(reading, {arguments})
fcntl.fcntl(reading, 10, 9)
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
writing.send(b'x')
os._exit(0)""") for name, arguments in (("fcntl", "fcntl.F_SETOWN, <VICTIM>"),
                                         ("ioctl", "0x8901, struct.pack('i', <VICTIM>)"))},
    "flags outside": (CALLS, """
flags = array.array('l', [0])
with open(<SECRET_FILE>, 'rb') as file:
    fcntl.ioctl(file, 0x80086601, flags)
    flags[0] |= 0x40
    fcntl.ioctl(file, 0x40086602, flags)"""),
    "the version outside": (CALLS, """
with open(<SECRET_FILE>, 'rb') as file: fcntl.ioctl(file, 0x40087602, array.array('l', [7]))"""),
    # Memory that has no address, so that RLIMIT_AS does not count it.
    "memory in a file": (CALLS, "os.memfd_create('it')"),
    "memory in sockets": (CALLS, """
held, carrier = 0, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
while held < 1 << 26:
    pair = socket.socketpair()
    for line in pair:
        line.setblocking(False)
        try: line.setsockopt(socket.SOL_SOCKET, 32, 1 << 26)
        except OSError: pass
        try:
            while held < 1 << 26: held += line.send(bytes(65536))
        except BlockingIOError: pass
    socket.send_fds(carrier[0], [b'x'], [line.fileno() for line in pair])"""),
    "memory in pipes": (CALLS, "fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)"),
    # What others do in a folder, without the right to list it.
    "names by inotify": (CALLS, """
handle = libc.inotify_init()
assert libc.inotify_add_watch(handle, <OUTSIDE>.encode(), 0x100) >= 0"""),
    "names by fanotify": (CALLS, """
handle = libc.fanotify_init(0xc00, 0)
folder, created = <OUTSIDE>.encode(), ctypes.c_uint64(0x100)
assert handle >= 0 and libc.fanotify_mark(handle, 1, created, -100, folder) == 0"""),
    **{f"a socket with a path, {name}": (CALLS, f"""
line = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
line.{name}({arguments})""") for name, arguments in (
        ("sendto", "b'x', <SOCKET_FILE>"), ("connect", "<SOCKET_FILE>"),
        ("sendmsg", "[b'x'], [], 0, <SOCKET_FILE>"))},
    # What only root may do. To the clock and to the host, the programs give what they have.
    "an immutable file": ((ROOT, SPACES, SECCOMP), """
with open('it', 'w') as file:
    flags = array.array('l', [0])
    fcntl.ioctl(file, 0x80086601, flags)
    flags[0] |= 0x10
    fcntl.ioctl(file, 0x40086602, flags)"""),
    "the clock": ((ROOT, SPACES, SECCOMP), "time.clock_settime(time.CLOCK_REALTIME, time.time())"),
    "the host's name": ((ROOT, SPACES, SECCOMP), "socket.sethostname(socket.gethostname())"),
    "a device of its own": ((ROOT, SPACES, LANDLOCK, SECCOMP),
                            "os.mknod('disk', 0o600 | stat.S_IFBLK, os.stat('.').st_dev)"),
    "lifting its limits": ((ROOT, SPACES), """
for most in (1 << 30, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (most, most))"""),
    # The numbers of 32-bit calls are others: here 20 is getpid. (mov eax, 20; int 0x80; ret)
    "calls of another machine": (CALLS, """
assert platform.machine() == 'x86_64'
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"""),
    "wiping all its files": (START, """
for file in range(64):
    try: os.ftruncate(file, 0), os.lseek(file, 0, 0), os.write(file, b'it did not start')
    except OSError: pass
os._exit(0)"""),
    "output that cannot be read": (START, """
for file in range(64):
    try: fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
    except OSError: pass
os._exit(0)"""),
}
# These also reach their aim in a plain interpreter. (The others need rights or a terminal, or they
# would harm the tests.)
WORKING = """own environment; environments of others; a secret file; a secret file by symlink;
a secret file by link; the list of a folder; writing outside; removing outside; renaming outside;
truncating outside; modes outside; times outside; owners outside; a connection;
a connection by ctypes; a datagram; an abstract socket; killing a process; killing by other calls;
killing all; killing its parent; limits of others; priority of others; killing by fcntl;
killing by ioctl; flags outside; the version outside; memory in a file; memory in pipes;
names by inotify; a socket with a path, sendto; a socket with a path, connect;
a socket with a path, sendmsg; another process; another program; a program that it brings;
rights to gain""".replace("\n", " ").split("; ")
if os.geteuid() == 0:
    WORKING += ["memory in sockets", "names by fanotify"]


def hostile(name):
    """The whole program, with DONE IT at its end."""
    code = HOSTILE[name][1].replace("libc.", "ctypes.CDLL(None).")
    return f"{with_imports(code)}\nprint('DONE IT')"


def in_the_open(code, folder):
    """What a program prints in a plain interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=folder, text=True)
    make_mutable(folder)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name, set_name", [
    case(name, set_name, fast=("all", *stopping)) for name, (stopping, _) in HOSTILE.items()
    for set_name, layers in SETS.items() if set(stopping) & set(layers)])
def test_hostile_program(name, set_name, outside, monkeypatch, tmp_path_factory):
    """It reaches nothing, harms nothing, and leaves nothing behind."""
    stopping, code = HOSTILE[name][0], hostile(name)
    use_layers(monkeypatch, set_name, stopping)
    if ROOT in stopping and "DONE IT" not in in_the_open(code, tmp_path_factory.mktemp("it")):
        pytest.skip("the rights of this user are not enough for it, sandbox or not")
    monkeypatch.setenv("TAVILY_API_KEY", SECRET)
    run = run_python(outside.fill(code), timeout_s=1)
    assert "DONE IT" not in run.stdout and SECRET not in run.stdout + run.stderr
    assert not re.search("(Name|Syntax|Import|ModuleNotFound)Error", run.stderr)
    assert run.seconds < 20                # it was stopped, not waited for
    outside.check()
    shared = Path("/proc/sysvipc/shm")
    assert not shared.exists() or "0x00007a11" not in shared.read_text()
    assert not Path("/dev/shm/planted").exists()


@pytest.mark.parametrize("name", WORKING)
def test_hostile_program_works_without_a_sandbox(name, outside, monkeypatch):
    """If it also failed without a sandbox, its failing in the sandbox would prove nothing."""
    monkeypatch.setenv("TAVILY_API_KEY", SECRET)
    printed = in_the_open(outside.fill(hostile(name)), outside.sandboxes)
    if "Inappropriate ioctl" in printed or "not supported" in printed:
        pytest.skip(f"the file system of {outside.folder} has no such flags")
    assert "DONE IT" in printed or outside.victim.wait(5) == -signal.SIGKILL, printed


# ---- programs that want a pass ------------------------------------------------------------------

CODE = "def add(a, b):\n    return a + b\n"
TEST = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
WRONG = "def add(a, b):\n    return a - b\n"

CHEATS = {
    "prints a verdict": "print('ok PASSED 2 passed in 0.01s\\nOK')",
    "sys.exit(0)": "sys.exit(0)",
    "raise SystemExit": "raise SystemExit",
    "os._exit(0)": "os._exit(0)",
    "exits in the function": "def add(a, b):\n    os._exit(0)",
    "SystemExit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "another program": "os.execv('/bin/true', ['true'])",
    "atexit": "atexit.register(os._exit, 0)",
    "excepthook": "sys.excepthook = lambda *_: os._exit(0)",
    "a thread that exits": "threading.Timer(.05, os._exit, [0]).start()\n"
                           "def add(a, b): time.sleep(9)",
    "kills itself": "os.kill(os.getpid(), 9)\nos.abort()",
    "kills its group": "os.killpg(0, 9)",
    "closes all files": "os.closerange(0, 256)\nos._exit(0)",
    "writes to all files": "for file in range(1, 64):\n"
                           "    try: os.write(file, b'0' * 32 + b'5')\n"      # a nonce, guessed
                           "    except OSError: pass\nos._exit(0)",
    "forks": "if os.fork(): os._exit(0)",
    "a parent that exits": "def add(a, b):\n    if os.fork(): os._exit(0)\n    return 1",
    "no output any more": "sys.stdout = sys.stderr = None",
    "deletes its folder": "shutil.rmtree('.', ignore_errors=True)",
    "its own test.py": "open('test.py', 'w').write('')",
    "endless": "while True: pass",
    "recursion": "def add(a, b):\n    return add(a, b)",
    "recursion without a limit": "sys.setrecursionlimit(10**9)\n"
                                 "def add(a, b):\n    return add(b, a)",
    "memory": "held = []\nwhile True: held.append(bytes(10**8))",
    "null bytes": "print(1)\0",
    "no python": "Sure! Here is the function:",
    "nothing": "",
    "200 kB": "x = '" + "a" * 200_000 + "'",
}


@pytest.mark.parametrize("name, set_name", [case(name, set_name, fast=["all"])
                                            for name in CHEATS for set_name in ("all", LIMITS)])
def test_no_pass_for_a_cheat(name, set_name, outside, monkeypatch):
    """The function is wrong or missing. So the program must not pass, whatever else it does."""
    use_layers(monkeypatch, set_name)
    code = with_imports(CHEATS[name] if "def add" in CHEATS[name] else WRONG + CHEATS[name])
    run = passes(code, TEST, timeout_s=0.6)
    assert run.status != "ok", run
    called = call_function(code, "add", [2, 3], timeout_s=0.6)
    assert called.status != "ok" or called.value != 5, called
    if set_name == "all" or "fork" not in code:
        outside.nothing_left()


@pytest.mark.parametrize("set_name", [case(set_name, fast=["all", LIMITS]) for set_name in SETS])
def test_a_right_program_passes(set_name, outside, monkeypatch):
    """The test script uses numpy, as those of MBPP+ do. A wrong program fails the same script."""
    use_layers(monkeypatch, set_name)
    test = "import numpy as np\nassert np.allclose(add(np.ones(3), 1), 2)\n" + TEST
    assert passes(CODE, test).status == "ok"
    run = passes(WRONG, test)
    assert run.status == "error" and "AssertionError" in run.stderr
    outside.check()


@pytest.mark.parametrize("more", [
    "threading.Thread(target=time.sleep, args=(60,)).start()", "sys.stdin.close()",
    "if __name__ == '__main__':\n    print(add(*input().split()))", "print('x' * 300_000)"])
def test_what_a_check_lets_be(more):
    """Threads that never end, closed input, a demonstration and noise are no reason to fail."""
    run = passes(with_imports(CODE + more), TEST)
    assert run.status == "ok" and run.seconds < 20, run


def test_call_function_gives_the_value_back():
    """The value travels through JSON. A method of Solution comes before a plain function."""
    method = "class Solution:\n    def add(self, a, b): return [a + b, {'k': None}]\n" + WRONG
    array = "import numpy\ndef add(a, b): return numpy.array([a, b])"
    for code, arguments, value in (
            (method, [1, 2], [3, {"k": None}]), ("class Solution: pass\n" + CODE, [1, 2], 3),
            (CODE, ["ä", "\n"], "ä\n"), (CODE, [[0] * 200_000, [1]], [0] * 200_000 + [1]),
            (array, [1, 2], [1, 2]), ("def add(a, b): return (a, b)", [1, 2], [1, 2])):
        assert call_function(code, "add", arguments).value == value
    assert call_function(CODE, "add", ["ä\ud800", "\0"]).status in ("ok", "error")
    for code in ("def add(a, b): return {1, 2}", "def add(a, b): return add", "",
                 "def add(a): return a", "def add(a, b): raise SystemExit(print('3'))",
                 "def add(a, b):\n    x = []\n    for _ in range(9000): x = [x]\n    return x",
                 "def add(a, b): return 10 ** 9000"):
        run = call_function(code, "add", [1, 2])
        assert (run.status, run.value) == ("error", None), run


# ---- what a program may do, and how it ends -----------------------------------------------------

@pytest.mark.parametrize("code, status, stdout", [
    ("print(6 * 7)", "ok", "42\n"),
    ("print(input() + '!')", "ok", "in ä!\n"),
    ("print(sys.stdin.read().split(), __name__)", "ok", "['in', 'ä'] __main__\n"),
    ("print(open(0).read())", "ok", "in ä\n\n"),
    ("open('a', 'w').write('x')\nprint(open('a').read(), sorted(os.listdir()))", "ok",
     "x ['a', 'program.py']\n"),
    ("threading.Thread(target=print, args=(1,)).start()", "ok", "1\n"),
    ("atexit.register(print, 'end')", "ok", "end\n"),
    ("raise SystemExit(0)", "ok", ""),
    ("print(1)\nsys.exit(3)", "error", "1\n"),
    ("os._exit(113 + 1)", "error", ""),
    ("print(1)\n1 / 0", "error", "1\n"),
    ("def f(): f()\nf()", "error", ""),
    ("print(", "error", ""),
    ("sys.stdout.buffer.write(b'a\\xff\\x00b')", "ok", "a\ufffd\ufffdb"),
    ("os.close(1)\nos.close(2)\nprint(5)", None, ""),
    ("ctypes.string_at(0)", "killed", ""),
    ("time.sleep(60)", "timeout", ""),
    ("for s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, 1)\nwhile True: pass",
     "timeout", ""),
    ("threading.Thread(target=time.sleep, args=(60,)).start()", "timeout", ""),
    ("os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)", "timeout", ""),
    ("x = bytearray(3 << 30)", "memory", ""),
    ("import numpy\nnumpy.ones(1 << 29)", "memory", ""),
    ("import numpy\nprint(numpy.ones(1 << 20).sum())", "ok", "1048576.0\n"),
])
def test_how_a_program_ends(code, status, stdout, outside):
    timeout = 0.6 if status == "timeout" else 20
    run = run_python(with_imports(code), stdin="in ä\n", timeout_s=timeout)
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
async def wait():
    await asyncio.sleep(.01)
    return await asyncio.to_thread(sum, [2, 3])
print(asyncio.run(wait()))""",
    "sqlite": """
base = sqlite3.connect('base')
base.execute('create table numbers (n)')
base.execute('insert into numbers values (5)')
base.commit()
print(*base.execute('select n from numbers').fetchone())""",
    "temporary files": """
with tempfile.TemporaryDirectory() as folder:
    with open(folder + '/a', 'w') as file: file.write('5')
    shutil.move(folder + '/a', 'b')
    shutil.copyfile('b', 'c')
    print(open('c').read())""",
    "an alarm": """
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, .05)
try: time.sleep(60)
except TimeoutError: print(5)""",
    "a thread with a large stack": """
resource.setrlimit(resource.RLIMIT_STACK, (1 << 26, resource.getrlimit(resource.RLIMIT_STACK)[1]))
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 27)
def deep(n): return deep(n - 1) if n else 5
threading.Thread(target=lambda: print(deep(30_000))).start()""",
    "pipes and selectors": """
reading, writing = os.pipe()
copied = os.dup(writing)
with selectors.DefaultSelector() as selector:
    selector.register(reading, selectors.EVENT_READ)
    os.write(copied, b'5')
    print(os.read(selector.select(5)[0][0].fd, 9).decode())""",
    "many modules": """
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


@pytest.mark.parametrize("name, set_name", [case(name, set_name, fast=["all"])
                                            for name in ORDINARY for set_name in ("all", LIMITS)])
def test_an_ordinary_program_works(name, set_name, monkeypatch):
    use_layers(monkeypatch, set_name)
    run = run_python(with_imports(ORDINARY[name]), timeout_s=20)
    assert (run.status, run.stdout, run.stderr) == ("ok", "5\n", ""), run


def test_memory_is_about_data():
    """200 MB fit into 256, and not into 64 together with what python itself may take. A program
    that leaves no memory at all, not even for a traceback, is told as such."""
    code = "x = bytes(%d << 20)\nprint(len(x))"
    assert run_python(code % 200, memory_mb=256).status == "ok"
    assert run_python(code % (200 + sandbox.FOR_PYTHON_MB), memory_mb=64).status == "memory"
    large = "x = []\ntry:\n    while True: x.append(bytes(1 << 20))\nexcept MemoryError: pass\n"
    run = run_python(large + "while True: x.append(str(len(x)))", timeout_s=60, memory_mb=1)
    assert run.status == "memory" and "MemoryError" in run.stderr


def test_a_check_may_take_four_gigabytes():
    """As in evalplus. numpy.empty takes addresses, and memory only where somebody writes."""
    code = "import numpy\nx = numpy.empty(%d << 30, 'u1')\ndef size(): return x.size"
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
    for code in ("while True: print('x' * 1_000_000)",
                 "big = open('big', 'wb')\nwhile True: big.write(bytes(1 << 20))"):
        run = run_python(code, timeout_s=5)
        assert run.status == "error" and "too large" in run.stderr and len(run.stdout) < 9_000_000
    outside.check()


FOLDERS = {
    "locked": "os.mkdir('a', 0)\nos.mkdir('b')\nopen('b/c', 'w')\nos.chmod('b', 0)",
    # deeper than python's recursion, and longer than a path may be
    "deep": "for _ in range(1100): os.mkdir('deep'), os.chdir('deep')",
    "links": "os.symlink('/', 'a')\nos.symlink('..', 'b')\nos.mkfifo('c')",
    "gone": "shutil.rmtree('.', ignore_errors=True)",
    "wide": "for i in range(300): os.mkdir(str(i))",
}


@pytest.mark.parametrize("name, set_name", [case(name, set_name, fast=["all"])
                                            for name in FOLDERS for set_name in ("all", LIMITS)])
def test_the_folder_goes_whatever_is_in_it(name, set_name, outside, monkeypatch):
    use_layers(monkeypatch, set_name)
    monkeypatch.setattr(sandbox, "CLEAN_UP_S", 100)
    run_python(with_imports(FOLDERS[name]), timeout_s=3)
    outside.check()


def test_a_slow_removal_holds_up_nobody(outside, monkeypatch, tmp_path_factory):
    """We wait CLEAN_UP_S for the removal, which then goes on alone. Here rm waits for a file `go`,
    for 20 seconds at most."""
    sandbox_layers()                             # found before rm is slow
    slow = tmp_path_factory.mktemp("bin") / "rm"
    wait = f"for _ in $(seq 200); do [ -e {slow.parent}/go ] || sleep .1; done"
    slow.write_text(f'#!/bin/sh\n{wait}\nexec {shutil.which("rm")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "CLEAN_UP_S", 0.2)
    assert run_python("print(5)").status == "ok"
    assert len(list(outside.sandboxes.iterdir())) == 1
    (slow.parent / "go").touch()
    late = time.monotonic() + 20
    while list(outside.sandboxes.iterdir()) and time.monotonic() < late:
        time.sleep(0.02)
    outside.check()


def test_many_threads_at_once(outside):
    """Each run gets its own output and its own verdict. Nothing is left behind."""
    with ThreadPoolExecutor(8) as pool:
        printed = [pool.submit(run_python, f"print(input() * 1000 + '{i}')", str(i))
                   for i in range(4)]
        called = [pool.submit(call_function, CODE, "add", [i, i]) for i in range(4)]
        wrong = [pool.submit(passes, CODE, f"assert add({i}, 1) == {i}") for i in range(4)]
        right = [pool.submit(passes, CODE, "import numpy\n" + TEST * 50) for _ in range(4)]
    assert [run.result().stdout for run in printed] == [f"{str(i) * 1000}{i}\n" for i in range(4)]
    assert [run.result().value for run in called] == [0, 2, 4, 6]
    assert all("AssertionError" in run.result().stderr for run in wrong)
    assert [run.result().status for run in wrong + right] == ["error"] * 4 + ["ok"] * 4
    outside.check()


# ---- layers -------------------------------------------------------------------------------------

def test_layers_are_named_and_what_is_missing_is_said(monkeypatch, capsys):
    assert LIMITS in sandbox_layers() and set(sandbox_layers()) <= set(ALL)
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: (LIMITS, SECCOMP))
    assert require_sandbox() == (LIMITS, SECCOMP)
    first, *lines = capsys.readouterr().out.splitlines()
    assert LIMITS in first and SECCOMP in first and LANDLOCK not in first
    for missing, attack in ((LANDLOCK, "open, list, write or remove your files"),
                            (f"{SPACES}, {LANDLOCK}", "read the environment or memory")):
        assert any(missing in line and attack in line for line in lines)
    assert not any(LIMITS in line or SECCOMP in line for line in lines)
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: ALL)
    require_sandbox()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_refused_without_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: ())
    with refuses("--allow_unsafe_code"):
        require_sandbox()
    assert require_sandbox(allow_unsafe=True) == ()
    assert run_python("print(1)").stdout == "1\n"


# What a machine lacks -> (code that makes its python like that, the layers that do not work there)
LACKING = {
    "namespaces": ("", [SPACES]),
    "landlock in its kernel": ("import landlock; landlock.Ruleset = None", [LANDLOCK]),
    "the package landlock": ("import sys; sys.modules['landlock'] = None", [LANDLOCK]),
    "namespaces and landlock": ("import sys; sys.modules['landlock'] = None", [SPACES, LANDLOCK]),
    "pyseccomp": ("import sys; sys.modules['pyseccomp'] = None", [SECCOMP]),
    "libseccomp": ("import ctypes; library = ctypes.CDLL; ctypes.CDLL = lambda name, **more: "
                   "library(name and name.replace('seccomp', 'missing'), **more)", [SECCOMP]),
    "capset": ("import ctypes; ctypes.CDLL.capset = lambda *_: -1", [ROOT]),
    "python": ("raise OSError", ALL),
}


@pytest.mark.parametrize("lacking", [pytest.param(
    name, marks=[] if name in ("namespaces and landlock", "pyseccomp", "capset", "python")
    else pytest.mark.slow) for name in LACKING])
def test_a_layer_that_does_not_work_is_left_out(lacking, tmp_path, monkeypatch):
    """It is not named, and a run that asks for it does not start. Without namespaces and landlock
    this process makes itself undumpable, so that nobody reads its environment."""
    available, (code, missing), libc = sandbox_layers(), LACKING[lacking], ctypes.CDLL(None)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -c {shlex.quote(code)}"\n$3" "$4"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    if SPACES in missing:
        monkeypatch.setattr(sandbox, "UNSHARE", ["false"])
    try:
        found = sandbox_layers.__wrapped__()             # the layers are looked for anew
        assert found == tuple(name for name in available if name not in missing)
        if set(available) & set(missing):
            with pytest.raises(SandboxError):
                run_python("print(1)")
        closed = bool(found) and not {SPACES, LANDLOCK} & set(found)
        assert libc.prctl(3, 0, 0, 0, 0) == (not closed)                # PR_GET_DUMPABLE
        if closed and os.geteuid() != 0:                 # root reads every environment
            monkeypatch.setattr(sandbox, "sandbox_layers", lambda: found)
            run = run_python("import os\nopen('/proc/%d/environ' % os.getppid()).read()")
            assert "PermissionError" in run.stderr
    finally:
        libc.prctl(4, 1, 0, 0, 0)                        # PR_SET_DUMPABLE, as before


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
        assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1         # still dumpable
