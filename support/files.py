"""Atomic files, one run per folder, and a fingerprint of what a run was about."""
import contextlib
import errno
import hashlib
import json
import os
import secrets
from pathlib import Path

from filelock import FileLock, Timeout

from support.errors import blame, need
from support.ranks import rank

SHIPPED = Path(__file__).resolve().parent.parent / "tiny"        # no run may write here
RESULTS = ("results.jsonl", "summary.json", "summary.png", "parts")      # of an evaluation
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)                   # of a file system
HELD = {}          # {this run's folder: (its lock, the lock's inode, what was saved before)}


def write_whole(path, write):
    """Write a file by write(temporary path), then rename it.

    A rename happens at once or not at all. So nobody ever sees half a file, not even after a crash.
    Raises OSError, naming the file."""
    path = Path(path)
    # A name of its own, because two threads may write the same file (the judge's verdicts).
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with blame(f"{path} could not be written", OSError):      # torch says RuntimeError
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.touch(exist_ok=False)         # a link of this name would lead to another file
            write(beside)
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


def write_lines(path, objects):
    """Write objects as .jsonl, one in each line."""
    text = "".join(json.dumps(one) + "\n" for one in objects)
    write_whole(path, lambda part: part.write_text(text))


def read_lines(path):
    """The objects in a .jsonl file, or [] if the file is missing. A line that a crash has cut off
    is left out."""
    lines = Path(path).read_text().split("\n") if Path(path).is_file() else []
    with blame(f"{path} is damaged: remove it"):
        return [json.loads(line) for line in lines if line.endswith("}")]


def claim(folder):
    """Lock a folder for this run before any work is done. release() unlocks it. (Of several ranks,
    rank 0 holds the lock for all.)

    Raises ValueError if another run writes to it, or if it is a shipped one; OSError if nothing can
    be written. The system unlocks the folder of a process that dies."""
    need(not Path(os.path.realpath(folder)).is_relative_to(SHIPPED), f"{folder} belongs to the "
         "shipped system, which a run would replace: name a folder under out/")
    if rank() > 0:
        return
    release()
    need(str(folder), "the name of the folder to write to is empty: name one")
    folder = Path(folder)
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    says = f"{folder} cannot be written to: name another folder, or make room"
    with blame(says, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # All other files are renamed into place, and that replaces a link.
        for path, plain in ((folder / ".lock", Path.is_file), (folder / "parts", Path.is_dir)):
            need(plain(path) and not path.is_symlink() or not os.path.lexists(path),
                 f"{path} is a link, or not what a run writes: remove it", OSError)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run writes to {folder}: wait for its end, or name another "
                         "folder") from None
    except OSError as problem:                           # some network file systems have no locks
        need(problem.errno in NO_LOCKS, f"{says}: {problem}", OSError)
        print(f"{folder} lies on a file system without locks ({problem.strerror}): start no second "
              "run into it", flush=True)
    HELD[folder] = lock, os.stat(lock.lock_file).st_ino, saved_in(folder)
    with blame(says, OSError):
        # A full disk still has room for an empty lock. So we try whether 4 kB fit.
        write_whole(folder / ".room", lambda part: part.write_text("room?\n" * 700))
        (folder / ".room").unlink()


def saved_in(folder):
    """What a run can go on from, state.pt and an evaluation's parts: {(file, its time)}."""
    return {(path, path.stat().st_mtime_ns)
            for name in ("state.pt", "parts/*.json") for path in folder.glob(name)}


def saved():
    """The folder of this run, if the run has saved anything there, else None."""
    changed = (folder for folder, (*_, before) in HELD.items() if saved_in(folder) - before)
    return next(changed, None)


def release():
    """Unlock this run's folder, and remove it if it is empty."""
    for folder, (lock, inode, _) in HELD.items():
        with contextlib.suppress(OSError):       # on Windows an open file cannot be removed
            # Another inode says that ours was deleted, and that this is another run's.
            if (folder / ".lock").stat().st_ino == inode:
                (folder / ".lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):       # the folder is not empty
            folder.rmdir()
    HELD.clear()


def move_aside(folder, names):
    """Move what an earlier run left here into a folder of its own: earlier_1, earlier_2, ..

    So the files of two runs never mix, and nothing is lost. names: of files, with wildcards."""
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
    """A short hash of links' weights and of plain data.

    A resumed run compares it. Its flags may be the same although a link, a prompt or a row of the
    data has changed."""
    digest = hashlib.sha256(repr(data).encode())
    for link in links:
        for value in link.state_dict().values():
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
