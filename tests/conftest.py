"""The fixtures that several files of tests use. What they are made of is in helpers.py."""
import sys

import pytest
from helpers import Script, load_mas_system, new_mas, nothing_in_float32, tiny_in_float64

from support import flags


@pytest.fixture(scope="module")
def mas():
    """The three-family system."""
    return new_mas()


@pytest.fixture(scope="session")
def shipped():
    """The tiny system that comes with the project, loaded as a user would."""
    return load_mas_system("tiny", device="cpu")


@pytest.fixture(scope="module")
def tiny_double():
    return tiny_in_float64()


@pytest.fixture
def double(tiny_double):
    """The shipped agents with new outer links, all in float64. Rollouts through untrained links
    amplify a rounding of 1e-7 to 4e-3 in the gradient, which would hide a real difference."""
    with nothing_in_float32():
        yield tiny_double


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Scripts that a test has started end with it, also where it fails."""
    yield
    while Script.started:
        Script.started.pop().end()


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, flags): a script's main() in this process, as its command line would run it.

    Returns (exit code, what it printed, its lines of error)."""
    def ask(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
        code = 0
        try:
            flags.run(script.main)
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith(("error", "Trace"))]
        return code, said.out, errors
    return ask
