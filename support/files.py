"""Files that are whole or not there, one run a folder, and a hash of what a run was about."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

from support.errors import blame, need

try:
    import fcntl
except ImportError:          # Windows has none, so there a folder is not locked
    fcntl = None

RESULTS = ("results.jsonl", "summary.json", "summary.png", "parts")      # of an evaluation
HELD = []                    # the lock on the folder of this process's run


def write_whole(path, write):
    """Write a file by write(temporary path), then rename it.

    A rename happens at once or not at all. So nobody ever sees half a file, also after a crash."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with blame(f"{path} could not be written", OSError):      # torch says RuntimeError
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside)
            mask = os.umask(0)               # safetensors makes files that only their owner reads
            os.umask(mask)
            os.chmod(beside, 0o666 & ~mask)
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):   # half a file of a full disk; else nothing is there
            beside.unlink()


def write_json(path, value):
    """Write `value` as indented JSON."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    """The object in a JSON file, or {} if there is no such file. Raises ValueError, naming it."""
    if not Path(path).is_file():
        return {}
    with blame(f"{path} is not a JSON object: write it again"):
        return {**json.loads(Path(path).read_text())}   # a list or a number is an error here


def claim(folder):
    """Take a folder for this run alone, before any work is done: release() gives it free.

    Raises ValueError if another run writes to it, OSError if nothing can be written. A process that
    dies leaves a file and no lock."""
    release()
    need(str(folder), "the name of the folder to write to is empty: name one")
    path = Path(folder) / ".lock"
    cannot = f"{folder} cannot be written to: name another folder, or make room"
    with blame(cannot, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        need(False, f"another run writes to {folder}: wait for its end, or name another folder")
    if not is_there(lock):                    # its owner released it between our two steps
        lock.close()
        return claim(folder)
    HELD.append(lock)
    with blame(cannot, OSError):
        lock.truncate(0)
        lock.write("a run writes here\n" * 200)      # a full disk has room for an empty file
        lock.flush()


def is_there(lock):
    """Whether an open lock is still the file of that name, and not one that was deleted."""
    path = Path(lock.name)
    return path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))


def saved():
    """The folder of this run, if anything is saved there by now: state.pt, or an evaluation's
    parts. Else None."""
    for lock in HELD:
        folder, began = Path(lock.name).parent, os.fstat(lock.fileno()).st_mtime
        if any(path.stat().st_mtime >= began for name in ("state.pt", "parts/*")
               for path in folder.glob(name)):
            return folder


def release():
    """Give the folder of this run free. An empty folder goes away."""
    for lock in HELD:
        with contextlib.suppress(OSError):
            if is_there(lock):
                os.unlink(lock.name)
                os.rmdir(Path(lock.name).parent)
        with contextlib.suppress(OSError):           # on a full disk the rest cannot be written
            lock.close()
    HELD.clear()


def move_aside(folder, names):
    """Move what an earlier run has left to a folder of its own, FOLDER/earlier_1, earlier_2, .. So
    nothing of one run lies beside another's, and nothing is lost. names: of files, with wildcards.
    """
    found = [path for name in names for path in sorted(Path(folder).glob(name))]
    if found:
        numbers = [int(path.name[8:]) for path in Path(folder).glob("earlier_*")
                   if path.name[8:].isdigit()]
        aside = Path(folder) / f"earlier_{max(numbers, default=0) + 1}"
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        print(f"what an earlier run left in {folder} is in {aside} now", flush=True)


def fingerprint(links, *data):
    """A short hash of links' weights and of plain data. A run that goes on compares it: the flags
    may be the same where a link, a prompt or a row is another one."""
    digest = hashlib.sha256(repr(data).encode())
    for link in links:
        for value in link.state_dict().values():
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
