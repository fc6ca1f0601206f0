"""Files that are whole or not there, and a hash by which a run knows what it was about."""
import hashlib
import json
import os
from pathlib import Path

from support.errors import blame


def write_whole(path, write):
    """Write a file by write(temporary path), then rename it.

    A rename happens at once or not at all. So nobody ever sees half a file, also after a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    write(beside)
    mask = os.umask(0)                       # safetensors makes files that only their owner reads
    os.umask(mask)
    os.chmod(beside, 0o666 & ~mask)
    os.replace(beside, path)


def write_json(path, value):
    """Write `value` as indented JSON."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    """The object in a JSON file, or {} if there is no such file. Raises ValueError, naming it."""
    if not Path(path).is_file():
        return {}
    with blame(f"{path} is not a JSON object: write it again"):
        return {**json.loads(Path(path).read_text())}   # a list or a number is an error here


def fingerprint(links, *data):
    """A short hash of links' weights and of plain data. A run that goes on compares it: the flags
    may be the same where a link, a prompt or a row is another one."""
    digest = hashlib.sha256(repr(data).encode())
    for link in links:
        for value in link.state_dict().values():
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
