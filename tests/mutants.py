"""Do the tests notice when a line is wrong? A mutant is the project with one line spoilt.

    python tests/mutants.py              all of them: some twenty minutes
    python tests/mutants.py 1 7 12       these alone

Each line of data/mutants.jsonl is one: a file, a text that stands in it once, the text to put
there, the test file that should fail, words that choose its tests (pytest -k), and what is wrong
then. A mutant that LIVES is a behaviour that no test guards. pytest does not collect this file.
"""
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MUTANTS = [json.loads(line) for line in (PROJECT / "tests/data/mutants.jsonl").open()]


def fate(folder, mutant):
    """Whether the tests notice: "killed", "LIVES", or what went wrong."""
    path = folder / mutant["file"]
    text = path.read_text()
    if text.count(mutant["old"]) != 1:
        return f"stands there {text.count(mutant['old'])} times"
    path.write_text(text.replace(mutant["old"], mutant["new"]))
    command = ["-m", "pytest", "-x", "-q", "-n", "0", "-m", "", f"tests/test_{mutant['tests']}.py"]
    done = subprocess.run([sys.executable, *command, "-k", mutant["k"]], cwd=folder,
                          capture_output=True)
    path.write_text(text)
    return {0: "LIVES", 1: "killed"}.get(done.returncode, f"pytest ends with {done.returncode}")


def main():
    numbers = [int(one) for one in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    fates = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        for number in numbers:
            mutant, started = MUTANTS[number - 1], time.time()
            fates.append(fate(folder, mutant))
            print(f"{fates[-1]:8s}{number:3d}  {mutant['file']}: {mutant['old']!r} -> "
                  f"{mutant['new']!r}  ({mutant['why']} test_{mutant['tests']} -k "
                  f"'{mutant['k']}', {time.time() - started:.0f} s)", flush=True)
    print(f"{fates.count('killed')} of {len(fates)} mutants are killed")


if __name__ == "__main__":
    main()
