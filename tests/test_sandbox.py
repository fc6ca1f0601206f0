"""The sandbox against hostile programs. The programs stand in data/programs.

Each hostile program runs with all layers. If several layers stop it, it also runs with each of them
alone, so that one layer does not hide that another is broken. Under `slow` it runs with all other
sets of layers too.
If a machine lacks a layer, the test is skipped and says so.
"""
import ast
import ctypes
import json
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
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers import PROJECT, refuses

from tools import sandbox
from tools.sandbox import (SandboxError, call_function, passes, require_sandbox, run_python,
                           sandbox_layers)

PROGRAMS = Path(__file__).parent / "data" / "programs"
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
        assert within(2, lambda: not processes_of(self.sandboxes)), processes_of(self.sandboxes)

    def close(self):
        for listener in self.listeners:
            listener.close()
        make_mutable(self.sandboxes)
        self.victim.kill()
        self.victim.wait()


def processes_of(folder):
    """The command lines of the processes whose environment names a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):            # gone meanwhile, or another user's
            if str(folder).encode() in file.read_bytes():
                found.append((file.parent / "cmdline").read_bytes()[-200:])
    return found


def within(seconds, condition):
    """Whether condition() becomes true within so many seconds."""
    late = time.monotonic() + seconds
    while not (fulfilled := condition()) and time.monotonic() < late:
        time.sleep(0.02)
    return fulfilled


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
    """A test case: the name of a program, if any, and of a set of layers. It is slow, unless its
    set is among `fast`."""
    return pytest.param(*names, id=" - ".join(names),
                        marks=[] if names[-1] in fast else pytest.mark.slow)


def all_and_limits(names):
    """Each program with all layers and, under `slow`, with the limits alone."""
    return pytest.mark.parametrize("name, set_name", [
        case(name, set_name, fast=["all"]) for name in names for set_name in ("all", LIMITS)])


# ---- programs from files ------------------------------------------------------------------------

def read_programs(file):
    """{name: (code, what else its heading says ..)}. A line `### name | more | more` begins each
    program. The text before the first heading describes the file."""
    programs = {}
    for section in re.split("^### ", (PROGRAMS / file).read_text("utf-8"), flags=re.M)[1:]:
        heading, _, code = section.partition("\n")
        name, *more = heading.split(" | ")
        assert name not in programs, f"{file} has two programs with the name {name}"
        programs[name] = (code.strip("\n"), *more)
    return programs


def named_layers(text):
    """The layers that a heading names: `landlock, seccomp`."""
    layers = text.split(", ")
    assert set(layers) <= set(ALL), text
    return layers


def with_imports(code):
    """A program, and before it the import of each module of python that it uses as `name.`"""
    used = set(re.findall(r"\b(\w+)\.", code)) & sys.stdlib_module_names
    return f"import {', '.join(sorted(used))}\n{code}" if used else code


# ---- hostile programs ---------------------------------------------------------------------------

WORKS = {"works": True, "works for root": os.geteuid() == 0}
HOSTILE = read_programs("hostile.txt")
WORKING = [name for name, (_, _, *works) in HOSTILE.items() if works and WORKS[works[0]]]


def hostile_cases():
    """Each hostile program with each set that has a layer that stops it."""
    for name, (_, layers, *_) in HOSTILE.items():
        stopping = named_layers(layers)
        fast = ["all"] if len(stopping) == 1 else ["all", *stopping]
        for set_name in SETS:
            if set(stopping) & set(SETS[set_name]):
                yield case(name, set_name, fast=fast)


def hostile(name):
    """The whole program, with DONE IT at its end."""
    code = HOSTILE[name][0].replace("libc.", "ctypes.CDLL(None).")
    return f"{with_imports(code)}\nprint('DONE IT')"


def in_the_open(code, folder):
    """What a program prints in a plain interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=folder, text=True)
    make_mutable(folder)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name, set_name", list(hostile_cases()))
def test_hostile_program(name, set_name, outside, monkeypatch, tmp_path_factory):
    """It reaches nothing, harms nothing, and leaves nothing behind."""
    code, stopping = hostile(name), named_layers(HOSTILE[name][1])
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
CHEATS = {name: code for name, (code,) in read_programs("cheats.txt").items()}
CHEATS |= {"null bytes": "print(1)\0", "200 kB": "x = '" + "a" * 200_000 + "'"}


@all_and_limits(CHEATS)
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


@pytest.mark.parametrize("set_name", [case(set_name, fast=["all"]) for set_name in SETS])
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
    "if __name__ == '__main__':\n    print(add(*input().split()))", "print('x' * 300_000)",
    "sys.stdout.close()", "os.close(1)\nprint(1)", "sys.stdout = None"])
def test_what_a_check_lets_be(more):
    """Threads that never end, closed files, a demonstration and noise are no reason to fail."""
    run = passes(with_imports(CODE + more), TEST)
    assert run.status == "ok" and run.seconds < 20, run


def test_call_function_gives_the_value_back():
    """The value travels through JSON. A method of Solution comes before a plain function."""
    method = "class Solution:\n    def add(self, a, b): return [a + b, {'k': None}]\n" + WRONG
    array = "import numpy\ndef add(a, b): return numpy.array([a, b])"
    for code, arguments, value in (
            (method, [1, 2], [3, {"k": None}]), ("class Solution: pass\n" + CODE, [1, 2], 3),
            (CODE, ["ä", "\n"], "ä\n"), (CODE, [[0] * 200_000, [1]], [0] * 200_000 + [1]),
            (array, [1, 2], [1, 2]), ("def add(a, b): return (a, b)", [1, 2], [1, 2]),
            (CODE, [10**9000, 1], 10**9000 + 1)):
        assert call_function(code, "add", arguments).value == value
    assert call_function(CODE, "add", ["ä\ud800", "\0"]).status in ("ok", "error")
    for name, (code,) in read_programs("no_value.txt").items():
        run = call_function(code, "add", [1, 2])
        assert (run.status, run.value) == ("error", None), name


# ---- what a program may do, and how it ends -----------------------------------------------------

ENDS, ORDINARY, FOLDERS = map(read_programs, ("ends.txt", "ordinary.txt", "folders.txt"))


@pytest.mark.parametrize("name", ENDS)
def test_how_a_program_ends(name, outside):
    code, status, printed = ENDS[name]
    timeout = 0.6 if status == "timeout" else 20
    run = run_python(with_imports(code), stdin="in ä\n", timeout_s=timeout)
    assert status in (run.status, "any"), run
    assert run.stdout == ast.literal_eval(printed)
    assert status != "timeout" or run.stderr == ""      # what it printed, not what unshare says
    assert "<string>" not in run.stderr                 # a traceback has no line of our own
    assert run.seconds < 20
    outside.check()


def test_a_start_that_takes_too_long_is_a_timeout(outside):
    """On a machine that is too busy, too: the sandbox is not broken, so it raises nothing."""
    assert run_python("print(1)", timeout_s=0.001).status == "timeout"
    assert passes(CODE, TEST, timeout_s=0.001).status == "timeout"
    outside.check()


@all_and_limits(ORDINARY)
def test_an_ordinary_program_works(name, set_name, monkeypatch):
    use_layers(monkeypatch, set_name)
    code, printed = ORDINARY[name]
    run = run_python(with_imports(code), timeout_s=20)
    assert (run.status, run.stdout, run.stderr) == ("ok", f"{printed}\n", ""), run


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


@all_and_limits(FOLDERS)
def test_the_folder_goes_whatever_is_in_it(name, set_name, outside, monkeypatch):
    use_layers(monkeypatch, set_name)
    monkeypatch.setattr(sandbox, "CLEAN_UP_S", 100)
    run_python(outside.fill(with_imports(*FOLDERS[name])), timeout_s=3)
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
    assert run_python("open('a', 'w')").status == "ok"
    assert len(list(outside.sandboxes.iterdir())) == 1
    (slow.parent / "go").touch()
    within(20, lambda: not list(outside.sandboxes.iterdir()))
    outside.check()


def start_and_sleep(outside, before=""):
    """(a process that runs a program which sleeps, the program's folder)"""
    code = before + "\nopen('begun', 'w')\nimport time\ntime.sleep(60)"
    there, layers = set(outside.sandboxes.iterdir()), sandbox.sandbox_layers()
    parent = subprocess.Popen([sys.executable, "-c", f"""if True:
        import tempfile
        tempfile.tempdir = {str(outside.sandboxes)!r}
        from tools import sandbox
        sandbox.confined_run({code!r}, "", 60, 99, layers={layers})"""], cwd=PROJECT)
    assert within(60, lambda: len(list(outside.sandboxes.glob("*/begun"))) > len(there))
    return parent, *set(outside.sandboxes.iterdir()) - there


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("before, set_name", [
    case("", "all", fast=["all"]), case("", LIMITS, fast=[LIMITS]), case("", SPACES, fast=[]),
    case("import ctypes\nctypes.CDLL(None).prctl(1, 0)", SPACES, fast=[SPACES]),
    case("import ctypes\nctypes.CDLL(None).prctl(1, 0)", SECCOMP, fast=[])])
def test_nothing_outlives_a_parent_that_is_killed(before, set_name, number, outside, monkeypatch):
    """Not even a program that asks the kernel to let it live. The next run removes its folder, and
    leaves the folder of a living run alone."""
    use_layers(monkeypatch, set_name)
    (killed, left), (living, used) = [start_and_sleep(outside, before) for _ in range(2)]
    killed.send_signal(number)
    killed.wait()
    assert within(2, lambda: not processes_of(left)) and processes_of(used)
    for folder in left, used:
        os.utime(folder, (1, 1))
    sandbox_layers.__wrapped__()
    assert within(20, lambda: not left.exists()) and used.exists()
    assert not living.kill() and living.wait()
    assert within(2, lambda: not processes_of(used))
    sandbox_layers.__wrapped__()
    within(20, lambda: not used.exists())
    outside.check()


def test_no_program_starts_if_the_parent_is_dead(tmp_path):
    """The parent holds a lock for as long as it lives. Here nobody does, and then the test does."""
    (tmp_path / "program.py").write_text("print('ran')")
    job = {"layers": [], "memory": 1 << 30, "seconds": 9, "calls": [], "err": 2, "check": None}
    command = [sys.executable, "-I", "-c", sandbox.INSIDE, json.dumps(job)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).stdout == b""
    with ExitStack() as stack:
        sandbox.lock(tmp_path, stack)
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).stdout == b"ran\n"


def test_many_threads_at_once(outside):
    """Each run gets its own output and its own verdict. Nothing is left behind."""
    with ThreadPoolExecutor(8) as pool:
        printed = [pool.submit(run_python, f"print(input() * 9 + '{i}')", str(i)) for i in range(3)]
        called = [pool.submit(call_function, CODE, "add", [i, i]) for i in range(3)]
        wrong = [pool.submit(passes, CODE, f"assert add({i}, 1) == {i}") for i in range(3)]
        right = [pool.submit(passes, CODE, "import numpy\n" + TEST * 50) for _ in range(3)]
    assert [run.result().stdout for run in printed] == [f"{str(i) * 10}\n" for i in range(3)]
    assert [run.result().value for run in called] == [0, 2, 4]
    assert all("AssertionError" in run.result().stderr for run in wrong)
    assert [run.result().status for run in wrong + right] == ["error"] * 3 + ["ok"] * 3
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


LACKING = read_programs("lacking.txt")


@pytest.mark.parametrize("lacking", [pytest.param(
    name, marks=[] if name in ("namespaces and landlock", "capset", "python")
    else pytest.mark.slow) for name in LACKING])
def test_a_layer_that_does_not_work_is_left_out(lacking, tmp_path, monkeypatch):
    """It is not named, and a run that asks for it does not start. Without namespaces and landlock
    this process makes itself undumpable, so that nobody reads its environment."""
    available, libc = sandbox_layers(), ctypes.CDLL(None)
    code, missing = LACKING[lacking][0], named_layers(LACKING[lacking][1])
    before = libc.prctl(3, 0, 0, 0, 0)                   # PR_GET_DUMPABLE
    libc.prctl(4, 1, 0, 0, 0)                            # PR_SET_DUMPABLE
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
        assert libc.prctl(3, 0, 0, 0, 0) == (not closed)
        if closed and os.geteuid() != 0:                 # root reads every environment
            monkeypatch.setattr(sandbox, "sandbox_layers", lambda: found)
            run = run_python("import os\nopen('/proc/%d/environ' % os.getppid()).read()")
            assert "PermissionError" in run.stderr
    finally:
        libc.prctl(4, before, 0, 0, 0)


def test_a_layer_gets_a_second_try(tmp_path, monkeypatch):
    """Here every other start of python fails, as on a machine that is full for a moment."""
    available, failed = sandbox_layers(), tmp_path / "failed"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nmkdir {failed} && exit 1\nrmdir {failed}\n"
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert sandbox_layers.__wrapped__() == available


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
