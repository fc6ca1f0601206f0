"""The sandbox against hostile programs.

A hostile program prints DONE IT where it has reached its aim. If it failed for another reason, its
stderr shows that. Each program runs under every set of layers that should stop it, so that one
layer does not hide that another is broken. If a machine lacks a layer, the test is skipped and says
so.
"""
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
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
        self.victim = subprocess.Popen(["sleep", "60"], env={"TAVILY_API_KEY": SECRET})
        self.limits = resource.prlimit(self.victim.pid, resource.RLIMIT_CPU)
        self.nice = os.getpriority(os.PRIO_PROCESS, self.victim.pid)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0sandbox-test-{os.getpid()}")
        self.abstract.listen()
        for listener in (self.tcp, self.udp, self.abstract):
            listener.setblocking(False)

    def fill(self, code):
        """The code with what it is to attack in place of <NAMES>."""
        for name, value in {"SECRET_FILE": str(self.file), "OUTSIDE": str(self.folder),
                            "VICTIM": self.victim.pid, "TCP": self.tcp.getsockname()[1],
                            "UDP": self.udp.getsockname()[1], "SECRET": SECRET,
                            "ABSTRACT": f"\0sandbox-test-{os.getpid()}",
                            "SIGNALLING": SIGNALLING}.items():
            code = code.replace(f"<{name}>", repr(value))
        return code

    def check(self):
        """Nothing was changed, nothing was reached, and nothing was left behind."""
        now = self.file.stat()
        assert self.file.read_text() == SECRET
        assert (now.st_mode, now.st_mtime_ns) == (self.before.st_mode, self.before.st_mtime_ns)
        assert sorted(path.name for path in self.folder.iterdir()) == ["sandboxes", "secret.txt"]
        assert self.victim.poll() is None
        assert resource.prlimit(self.victim.pid, resource.RLIMIT_CPU) == self.limits
        assert os.getpriority(os.PRIO_PROCESS, self.victim.pid) == self.nice
        for listener in (self.tcp, self.abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(1)
        self.nothing_left()

    def nothing_left(self):
        """No folder and no process is left. What a program starts inherits HOME, a folder of ours,
        by which we know it."""
        assert list(self.sandboxes.iterdir()) == []
        left = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(self.sandboxes).encode() in file.read_bytes():
                    left.append((file.parent / "cmdline").read_bytes()[-200:])
            except OSError:
                continue               # gone meanwhile, or another user's
        assert left == []

    def close(self):
        for listener in (self.tcp, self.udp, self.abstract):
            listener.close()
        self.victim.kill()
        self.victim.wait()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    there = Outside(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(there.sandboxes))
    yield there
    there.close()


LIMITS, PID, NET, LANDLOCK, SECCOMP = sandbox.LAYERS
SETS = {"all": tuple(sandbox.LAYERS), "no seccomp": (LIMITS, PID, NET, LANDLOCK),
        "no landlock": (LIMITS, PID, NET, SECCOMP), "no namespaces": (LIMITS, LANDLOCK, SECCOMP),
        "limits": (LIMITS,)}

# name -> (the layers of which any one stops it, the program)
HOSTILE = {
    "own environment": ((LIMITS,), """
import os
if any('tvly' in value for value in os.environ.values()): print('DONE IT')"""),
    "environments of others": ((PID, LANDLOCK), """
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
    "the parent's memory": ((PID, LANDLOCK), """
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
    "a connection": ((NET, SECCOMP), """
import socket
socket.create_connection(('127.0.0.1', <TCP>), timeout=1)
print('DONE IT')"""),
    "a connection by ctypes": ((NET, SECCOMP), """
import ctypes, socket, struct
libc = ctypes.CDLL(None)
line = libc.socket(2, 1, 0)
address = struct.pack('=HHI8x', 2, socket.htons(<TCP>), socket.htonl(0x7f000001))
if line >= 0 and libc.connect(line, address, 16) == 0: print('DONE IT')"""),
    "a datagram": ((NET, SECCOMP), """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', <UDP>))
print('DONE IT')"""),
    "an abstract socket": ((NET, SECCOMP), """
import socket
socket.socket(socket.AF_UNIX).connect(<ABSTRACT>)
print('DONE IT')"""),
    "killing a process": ((PID, SECCOMP), """
import os, signal
os.kill(<VICTIM>, signal.SIGKILL)
print('DONE IT')"""),
    "killing by other calls": ((PID, SECCOMP), """
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
    "killing all": ((PID, SECCOMP), "import os\nos.kill(-1, 0)\nprint('DONE IT')"),
    "killing its parent": ((PID, SECCOMP), """
import os
if os.getppid():
    os.kill(os.getppid(), 0)
    print('DONE IT')"""),
    "limits of others": ((PID, SECCOMP), """
import resource
resource.prlimit(<VICTIM>, resource.RLIMIT_CPU, (1, 1))
print('DONE IT')"""),
    "priority of others": ((PID, SECCOMP), """
import os
os.setpriority(os.PRIO_PROCESS, <VICTIM>, 19)
print('DONE IT')"""),
    "tracing others": ((PID, LANDLOCK, SECCOMP), """
import ctypes
if ctypes.CDLL(None).ptrace(0x4206, <VICTIM>, 0, 0) == 0: print('DONE IT')"""),
    "a fork bomb": ((PID, SECCOMP), """
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
    "a daemon": ((PID, SECCOMP), """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 100)
        time.sleep(60)
    os._exit(0)"""),
    "a set-uid program": ((SECCOMP,), """
import subprocess
print(subprocess.run(['su', '-c', 'true']))
print('DONE IT')"""),
    "shared memory that stays": ((PID, SECCOMP), """
import ctypes
ctypes.CDLL(None).shmget(0x7a11, 4096, 0o1600)"""),
    "mounting": ((LANDLOCK, SECCOMP), """
import ctypes
if ctypes.CDLL(None).mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0: print('DONE IT')"""),
    "the terminal": ((LIMITS,), "open('/dev/tty', 'w').write('x')\nprint('DONE IT')"),
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
def test_hostile_program(name, set_name, outside, monkeypatch):
    """It reaches nothing, harms nothing, leaves nothing behind, and gets no pass."""
    stopping, code = HOSTILE[name]
    use_layers(monkeypatch, set_name, stopping)
    monkeypatch.setenv("TAVILY_API_KEY", SECRET)
    run = run_python(outside.fill(code), timeout_s=1)
    assert "DONE IT" not in run.stdout and SECRET not in run.stdout + run.stderr
    assert run.seconds < 20                # it was stopped, not waited for
    outside.check()
    shared = Path("/proc/sysvipc/shm")
    assert not shared.exists() or "0x00007a11" not in shared.read_text()
    assert not Path("/dev/shm/planted").exists()


# Programs that reach their aim in a plain interpreter. (The others need rights or a terminal.)
WORKING = ["environments of others", "a secret file", "a secret file by links", "writing outside",
           "truncating outside", "modes outside", "times outside", "a connection",
           "a connection by ctypes", "a datagram", "an abstract socket", "killing a process",
           "killing by other calls", "killing all", "killing its parent", "limits of others",
           "priority of others"]


@pytest.mark.parametrize("name", WORKING)
def test_hostile_program_works_without_a_sandbox(name, outside):
    """If it also failed without a sandbox, its failing in the sandbox would prove nothing."""
    done = subprocess.run([sys.executable, "-c", outside.fill(HOSTILE[name][1])],
                          capture_output=True, cwd=outside.sandboxes, text=True)
    assert "DONE IT" in done.stdout or outside.victim.wait(5) == -signal.SIGKILL, done.stderr


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
    run = run_python(code, stdin="in ä\n", timeout_s=1)
    assert status is None or run.status == status, run
    assert run.stdout == stdout
    assert run.seconds < 20
    outside.check()


def test_memory_is_about_data():
    """200 MB fit into 256, and not into 64 together with what python itself may take."""
    code = "x = bytearray(%d << 20)\nprint(len(x))"
    assert run_python(code % 200, memory_mb=256).status == "ok"
    assert run_python(code % (200 + sandbox.FOR_PYTHON_MB), memory_mb=64).status == "memory"


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
    "for i in range(300): open(str(i), 'w')",
])
def test_the_folder_goes_whatever_is_in_it(code, set_name, outside, monkeypatch):
    use_layers(monkeypatch, set_name)
    run_python(code, timeout_s=3)
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
    assert "sandbox: process limits, seccomp\n" in printed
    assert "WITHOUT landlock" in printed and "WITHOUT seccomp" not in printed


def test_refused_without_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: ())
    with pytest.raises(ValueError, match="--allow_unsafe_code") as caught:
        require_sandbox()
    assert "\n" not in str(caught.value)
    assert require_sandbox(allow_unsafe=True) == ()
    assert run_python("print(1)").stdout == "1\n"


@pytest.mark.parametrize("broken, expected", [
    ("unshare", [LIMITS, LANDLOCK, SECCOMP]), ("seccomp", [LIMITS, PID, NET, LANDLOCK]),
    ("landlock", [LIMITS, PID, NET, SECCOMP]), ("python", [])])
def test_a_layer_that_does_not_work_is_left_out(broken, expected, monkeypatch):
    """unshare fails as it does where user namespaces are forbidden. An unknown machine has no
    seccomp."""
    available = sandbox_layers()
    if broken == "unshare":
        monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
    elif broken == "seccomp":
        monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    elif broken == "python":
        monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    else:
        monkeypatch.setattr(sandbox, "LAUNCHER", sandbox.LAUNCHER.replace("444", "9999"))
    monkeypatch.setattr(sandbox.ctypes, "CDLL", None)    # so that this process stays dumpable
    found = sandbox_layers.__wrapped__()                 # the layers are looked for anew
    assert found == tuple(layer for layer in expected if layer in available)
    monkeypatch.setattr(sandbox, "sandbox_layers", lambda: available)
    if broken in ("unshare", "landlock", "python") and available == tuple(sandbox.LAYERS):
        with pytest.raises(SandboxError):
            run_python("print(1)")


CLOSED = """
from support import sandbox
real = sandbox.confined_run
def broken(code, stdin, timeout_s, memory_mb, layers, orders=""):
    if {"pid namespace", "landlock"} & set(layers):
        raise sandbox.SandboxError("not on this machine")
    return real(code, stdin, timeout_s, memory_mb, layers, orders)
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
    if {PID, LANDLOCK} & set(sandbox_layers()):
        assert sandbox.ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1         # still dumpable
