"""What README, lesson and docs show, run as it stands there; and the plan of the house."""
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROJECT

import evaluate
import train_inner
import train_outer
from docs import solutions
from styles import get_style

README = (PROJECT / "README.md").read_text()
PAGES = "\n".join([README, *(page.read_text() for page in sorted(PROJECT.glob("docs/*.md")))])
SCRIPTS = {"train_inner.py": train_inner, "train_outer.py": train_outer, "evaluate.py": evaluate}
# Added to the README's commands, so that they take seconds.
SHORTER = json.loads((PROJECT / "tests/data/shorter.json").read_text())


def expanded(line):
    """The commands of a line: `for x in a b; do COMMAND; done` is COMMAND for a, and for b."""
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.*); done", line.split("  #")[0].strip())
    if not loop:
        return [line]
    return [command for value in loop[2].split()
            for command in expanded(loop[3].replace(f"${loop[1]}", value))]


def section(title):
    """The text under a heading, up to the next one."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def run_commands(block, monkeypatch):
    """Run the commands of a block, in short: the scripts. (tests/test_ranks.py has torchrun.)"""
    scripts = []
    for command in block.replace("\\\n", " ").strip().split("\n"):
        program, script, *arguments = shlex.split(command.split("  #")[0])
        if program == "python":
            scripts.append(script)
            monkeypatch.setattr(sys, "argv", [script, *arguments, *SHORTER[script].split()])
            SCRIPTS[script].main() if script in SCRIPTS else runpy.run_path(script)
    return scripts


def test_the_style_of_docs_debate(tmp_path, monkeypatch, capsys):
    """Its files are written, its rows made, its links trained, its debate scored."""
    text = (PROJECT / "docs/debate.md").read_text()
    style, rows = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    models = (PROJECT / "docs/models.md").read_text()
    changed = re.search(r"```python\n(from dataclasses .*?)```", models, re.DOTALL)[1]
    commands = re.search(r"```\n(python rows.py\n.*?)```", text, re.DOTALL)[1]
    assert len(style.splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(changed)
    mine = get_style("mine.py")
    assert mine.name == "mine" and "Plan this:" in mine.role("planner").first
    (tmp_path / "debate.py").write_text(style)
    (tmp_path / "rows.py").write_text(rows)
    assert run_commands(commands, monkeypatch) == [
        "rows.py", "train_inner.py", "train_outer.py", "evaluate.py"]
    assert ("python evaluate.py --style debate.py --ckpt_override outer=out/debate "
            in capsys.readouterr().out)                               # the trainer's last line
    summary = json.loads((tmp_path / "out/evaluate/summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["text", "untrained", "latent"]
    assert all(row["style"] == "debate" and row["n"] == 4 for row in summary["rows"])
    assert (tmp_path / "out/pro/adapter.safetensors").is_file()


@pytest.mark.parametrize("page, at", [(README, "python train_inner.py --style tiny --mas_role"),
                                      (PAGES, "python train_outer.py --latents teacher --role")])
def test_commands_run_one_after_the_other(page, at, tmp_path, monkeypatch, capsys):
    """Those of README's training and evaluation, and the published loss of docs/training.md. Then
    the command of the trainer's last line. Its comparison has all methods."""
    block = at + page.split(at)[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    run_commands(block, monkeypatch)
    command = re.findall("^python evaluate.py .*", capsys.readouterr().out, re.M)[-1]
    run_commands(command, monkeypatch)
    assert "round 1  solver     writes" in capsys.readouterr().out
    folder = re.search(r"outer=(\S+)", command)[1]
    assert {row["method"] for row in json.loads((tmp_path / folder / "summary.json").read_text())[
        "rows"]} == {*evaluate.METHODS}


def test_the_code_of_the_readme():
    """The example under the reading order, word for word."""
    code = re.search(r"```python\n(from recurse import .*?)```", section("Read it in this order"),
                     re.DOTALL)[1]
    names = {}
    exec(code, names)                                   # our own text, from our own README
    assert names["run"].thoughts[1, "planner"].shape == (1, 6, 96)
    assert names["run"].sent[1, "outer_12"].shape == (1, 6, 80)


EXTEND = (PROJECT / "docs/extend.md").read_text()
# Its blocks: (the line above, which ends with the name of a file; the kind of block; the text).
BLOCKS = re.findall(r"([^\n]*)\n\n```(\w*)\n(.*?)```", EXTEND, re.DOTALL)


def save_blocks(folder):
    """Save the files of docs/extend.md: their names."""
    files = {re.findall(r"`([\w.]+)`", above)[-1]: text for above, kind, text in BLOCKS if kind}
    for name, text in files.items():
        (folder / name).write_text(text)
    return set(files)


def test_the_files_of_docs_extend(tmp_path, monkeypatch):
    """Its changes fit the code, its styles can be loaded, and its task is asked."""
    assert save_blocks(tmp_path) == {"pair.py", "near.py", "kind.diff", "backwards.diff",
                                     "alone.py"}
    subprocess.run(["git", "apply", "--check", *tmp_path.glob("*.diff")], cwd=PROJECT, check=True)
    monkeypatch.chdir(tmp_path)
    assert [get_style(f"{name}.py").name for name in ("pair", "alone")] == ["pair", "alone"]
    run_commands(re.search("python evaluate.py --dataset near.*", EXTEND)[0], monkeypatch)
    with open("out/evaluate/results.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert {line["dataset"] for line in lines} == {"near"} and "off by" in lines[0]["notes"][0]


@pytest.mark.slow
def test_a_reader_follows_docs_extend(tmp_path):
    """From top to bottom by copying, in a copy of the project. Each line that it shows behind a #
    is printed. An accuracy may be as near as another processor makes it."""
    copy = shutil.copytree(PROJECT, tmp_path / "copy", ignore=shutil.ignore_patterns("out", ".git"))
    save_blocks(copy)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in (text for _, kind, text in BLOCKS if not kind):
        printed = subprocess.run(["bash", "-ec", block], cwd=copy, text=True, check=True,
                                 env={**os.environ, "PATH": path}, stdout=subprocess.PIPE).stdout
        for shown in re.findall("^# (.*)", block, re.M):
            *words, last = shown.split()
            lines = [line.split() for line in printed.replace(",", " ").splitlines()]
            found = [line[len(words)] for line in lines if line[:-1][:len(words)] == words]
            assert last in found or abs(float(last) - float(found[0])) < .06, (shown, printed)
    assert (copy / "link.py").read_text() == (PROJECT / "link.py").read_text()


def test_files_that_the_pages_name_exist():
    """Files and folders of the project, wherever a page names them. A page of docs/ may name a file
    of docs/ alone, and any page a file of a folder that it has just named."""
    own = {"debate.py", "my_style.py", "light_published.py", "pair.py", "near.py", "alone.py"}
    folders = {path.name for path in PROJECT.iterdir() if path.is_dir() and path.name[0] != "."}
    names = set(re.findall(r"(?<![\w./-])((?:[\w.-]+/)*[\w.-]+\.(?:py|md|png))\b",
                           re.sub("(?m)^(---|\\+\\+\\+) .*", "", PAGES)))
    names |= set(re.findall(rf"(?<![\w./-])((?:{'|'.join(folders)})/[\w./]*\w)", PAGES))
    names = {name for name in names - own if not name.startswith("out/") and name != "tests/test_"}
    assert names > {"train_outer.py", "tasks/tiny.py", "docs/training.md", "pictures/accuracy.png"}
    lone = {path.name for folder in folders for path in (PROJECT / folder).rglob("*.py")}
    wrong = {name for name in names - lone
             if not (PROJECT / name).exists() and not (PROJECT / "docs" / name).exists()}
    assert not wrong
    modules = set(re.findall(r"python -m ([\w.]+)", PAGES)) - {"pytest"}
    assert "bench" in modules and all(map(importlib.util.find_spec, modules))


def rooms():
    """{room: the rooms that it imports}. A room is a folder, or a file beside README.md."""
    files = {file: file.relative_to(PROJECT).parts[0].removesuffix(".py")
             for pattern in ("*.py", "*/*.py") for file in PROJECT.glob(pattern)}
    found = {room: set() for room in files.values() if room not in ("docs", "tests")}
    for file, room in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            found.get(room, set()).update({name.split(".")[0] for name in names} - {room})
    return {room: imported & found.keys() for room, imported in found.items()}


def test_imports_point_downwards():
    """Those at the bottom know nothing of the method. No rooms import each other in a circle."""
    left = rooms()
    assert {"recurse", "training", "gpu"} <= left.keys() and "styles" in left["prompts"]
    assert not left["support"]
    for room in ("link", "cache", "styles", "tools", "reference"):
        assert left[room] <= {"support"}, room
    while left:                        # take out rooms that import none of those that are left
        ready = [room for room, imported in left.items() if not imported & left.keys()]
        assert ready, f"a circle: {left}"
        left = {room: imported for room, imported in left.items() if room not in ready}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_the_readme_exist(script, monkeypatch, capsys):
    """Every flag in a command of README and docs is a flag of that script."""
    lines = PAGES.replace(EXTEND, "").replace("\\\n", " ").split("\n")
    commands = [command for line in lines for command in expanded(line)
                if command.startswith(f"python {script}")]
    assert commands
    for command in commands:
        arguments = shlex.split(command.split("#")[0])[2:]
        style = arguments[arguments.index("--style") + 1] if "--style" in arguments else "tiny"
        if style.endswith(".py"):
            continue                                    # run above
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        SCRIPTS[script].parse()
    capsys.readouterr()


# ---- the lesson, and its exercises ---------------------------------------------------------------

def test_the_lesson_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(PROJECT / "lesson.py"))
    printed = capsys.readouterr().out
    for cell in range(1, 9):
        assert f"\n{cell}. " in f"\n{printed}"
    assert (tmp_path / "out/lesson/lesson.png").stat().st_size > 10_000


@pytest.mark.slow                   # the same again, as its users see it
def test_the_notebook_runs(tmp_path, monkeypatch):
    """`jupytext --to ipynb lesson.py` makes it. Each cell of code ends without an error."""
    command, nbclient = pytest.importorskip("jupytext.cli"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    made = tmp_path / "lesson.ipynb"
    command.jupytext(["--to", "ipynb", "--output", str(made), str(PROJECT / "lesson.py")])
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    notebook = nbclient.execute(command.read(made), cwd=tmp_path, kernel_name="python3")
    printed = "".join(out["text"] for cell in notebook.cells for out in cell.get("outputs", []))
    assert "\n8. |dL" in printed and (tmp_path / "out/lesson/lesson.png").is_file()


SLOW = (6, 8, 9, 10)         # exercises that train


@pytest.mark.parametrize("number", [
    pytest.param(number, marks=[pytest.mark.slow] if number in SLOW else [])
    for number in range(1, len(solutions.SOLUTIONS) + 1)])
def test_the_solutions_find_what_the_exercises_expect(number, shipped, monkeypatch):
    """With fewer problems and kinds. Each solution says whether it found what is expected."""
    monkeypatch.setattr(solutions, "EXAMPLES", solutions.EXAMPLES[:30])
    monkeypatch.setattr(solutions, "KINDS", ("1layer", "2layer_ln_res"))
    torch.manual_seed(0)
    assert solutions.SOLUTIONS[number - 1](shipped)


def test_the_lesson_has_cells():
    """Each cell of code stands after one of text, as editors and jupytext read them."""
    marks = [line for line in (PROJECT / "lesson.py").read_text().splitlines()
             if line.startswith("# %%")]
    assert marks.count("# %% [markdown]") == 9 and marks.count("# %%") == 10
