"""What a user brings: rows of data, and Python files that make a style or a task.

    for source, row in read_rows("my/rows.jsonl"):
        print(source, row)                          my/rows.jsonl row 1 {'question': ..
    run_file("my/near.py", "task file")             {'Near': <class>, ..}

Rows are read one by one. So nothing waits for the end of a large file, and a fault behind the last
row that is wanted costs nothing. A row comes with its Source, so that a complaint about it can name
its file and its number. What a row means is decided in tasks/ and training/rows.py.

A Python file is run as it stands, with all rights of the user, as `python my/near.py` would be.
"""
import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from support.errors import blame, need


class Source(NamedTuple):
    """Where a row is from: the file or data set, its number from 1, its first byte in a .jsonl."""
    file: str
    number: int
    offset: int | None = None

    def __str__(self):
        return f"{self.file} row {self.number}"


def read_rows(name, config=None, split=None, field="data"):
    """Yields (Source, row) of a local .json or .jsonl file, or of a data set on the hub.

    A .json holds a list, or a list under `field`. A .jsonl is read line by line. config: of a hub
    set, or the numbers of its files `SPLIT2.jsonl`, if `datasets` cannot read it. Raises ValueError
    or OSError, naming the file and the row."""
    path = Path(name)
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                source = Source(str(path), number, file.tell() - len(line))
                if line.strip():
                    yield source, parse_json(line, source)
        return
    if path.suffix == ".json":
        content = parse_json(path.read_bytes(), path)
        rows = content.get(field) if isinstance(content, dict) else content
        need(isinstance(rows, list), f"{path} must hold a list of rows, or a list under '{field}'")
    else:
        need(not path.is_file() and path.suffix not in (".csv", ".tsv", ".parquet", ".txt"),
             f"{path} is neither .json nor .jsonl: convert it")
        with blame(f"{name} could not be read from the hub: check the network (HF_HUB_OFFLINE); if "
                   "it is gated, accept its terms there and run `hf auth login`; or give a local "
                   "file of its rows", OSError):
            if isinstance(config, tuple):
                from huggingface_hub import hf_hub_download
                for number in config:              # each file is fetched when its turn comes
                    yield from read_rows(hf_hub_download(name, f"{split}{number}.jsonl",
                                                         repo_type="dataset"))
                return
            import datasets                    # takes a second to import: only where it is needed
            rows = datasets.load_dataset(str(name), config, split=split)
    for number, row in enumerate(rows, start=1):
        yield Source(str(name), number), row


def parse_json(text, name):
    """json.loads whose ValueError names the file or row in one line."""
    with blame(f"{name} is not JSON: correct or remove it"):
        return json.loads(text)


def run_file(path, what):
    """{name: value} of what a user's .py file makes. It may import the files beside it.

    what: "style file" or "task file", for the error. Raises FileNotFoundError if it is missing, and
    ValueError, in one line that names it, if it fails."""
    sys.path.append(str(Path(path).resolve().parent))
    with blame(f"{what} {path} fails"):
        return runpy.run_path(str(path))
