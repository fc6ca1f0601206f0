"""A folder belongs to one run, files are whole or not there, and a full disk is found early.

The scripts run in processes of their own where a lock is concerned, as two users would start them.
"""
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT

import evaluate
import train_inner
import train_outer
from link import InnerLink
from recurse import load_mas_system
from styles import get_style
from support import files, flags
from support.checkpoints import load_inner, save_inner

QUICK = ["--num_samples", "8", "--batch_size", "2", "--held_out", "2", "--max_steps", "2"]
OUTER = ["--num_samples", "8", "--batch_size", "2", "--max_steps", "2", "--warm_start_steps", "1",
         "--eval_samples", "0", "--num_recursive_rounds", "1"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, flags): (exit code, what it printed, what it complained)."""
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


def start(script, *options):
    """A script in a process of its own. It hears Ctrl-C, also if the tests run in the background,
    where a shell makes all that it starts deaf to it."""
    return subprocess.Popen([sys.executable, script, *map(str, options)], cwd=PROJECT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# ---- one run, one folder ------------------------------------------------------------------------

@pytest.mark.parametrize("script, options, folder", [
    ("train_outer.py", [*OUTER, "--max_steps", 40], "--save_dir"),
    ("evaluate.py", ["--num_samples", 100, "--method", "latent", "text"], "--out")])
def test_two_processes_in_one_folder(script, options, folder, tmp_path):
    """Started at once: one result and one refusal."""
    both = [start(script, *options, folder, tmp_path / "out") for _ in range(2)]
    codes, complaints = [], ""
    for process in both:
        complaints += process.communicate(timeout=120)[1]
        codes.append(process.returncode)
    assert sorted(codes) == [0, 2], complaints
    assert f"error: another run writes to {tmp_path / 'out'}: wait for its end" in complaints
    assert "Traceback" not in complaints
    assert not list((tmp_path / "out").glob("earlier_*"))
    assert not (tmp_path / "out/.lock").exists()


def test_a_dead_process_leaves_no_lock(tmp_path):
    code = (f"from support.files import claim; claim({str(tmp_path)!r}); print(1, flush=True); "
            "input()")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, text=True,
                               stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "1\n"
    with pytest.raises(ValueError, match="another run writes to"):
        files.claim(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    files.claim(tmp_path)
    files.release()
    assert not tmp_path.exists()                          # nothing was written there


def test_a_run_that_is_stopped_early_says_that_nothing_is_saved(tmp_path):
    """Here in the warm start, with the state of an earlier run in the folder."""
    (tmp_path / "state.pt").write_text("of an earlier run")
    process = start("train_outer.py", "--warm_start_steps", 10**6, "--save_dir", tmp_path)
    while "warm start" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.endswith("stopped; nothing new is saved yet\n"), said
    assert (tmp_path / "state.pt").read_text() == "of an earlier run"


@pytest.mark.parametrize("script, options, folder", [
    ("train_outer.py", ["--save_steps", 1, "--warm_start_steps", 1], "--save_dir"),
    ("evaluate.py", ["--num_samples", 200, "--batch_size", 2], "--out")])
def test_a_run_that_is_stopped_says_where_it_goes_on(script, options, folder, tmp_path):
    """Also after another run was refused there."""
    process = start(script, *options, folder, tmp_path)
    while not [*tmp_path.glob("state.pt"), *tmp_path.glob("parts/*.json")]:
        assert process.poll() is None
        time.sleep(0.1)
    with pytest.raises(ValueError, match="another run writes to"):
        files.claim(tmp_path)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert said.endswith(f"stopped; --resume goes on from {tmp_path}\n"), said


def test_a_lock_that_was_deleted_is_no_lock(tmp_path):
    """A run that releases its lock while another one opens it does not leave two owners."""
    files.claim(tmp_path)
    mine, = files.HELD
    os.unlink(mine.name)
    with open(mine.name, "w") as other:                   # a newer run's lock of the same name
        assert not files.is_there(mine) and files.is_there(other)
        files.release()
        assert files.is_there(other), "release() deletes its own lock and no other"


def test_links_without_notes_and_odd_manifests_are_moved_aside_too(tmp_path, run):
    """Released links have no train_args.json. No name of a manifest leads out of the folder."""
    shutil.copytree(PROJECT / "tiny/outer", tmp_path / "links")
    (tmp_path / "keep.txt").write_text("mine")
    config = json.loads((tmp_path / "links/outerlink_config.json").read_text())
    config["adapters"].append({"filename": "../keep.txt"})
    (tmp_path / "links/outerlink_config.json").write_text(json.dumps(config))
    assert run(train_outer, *OUTER, "--save_dir", tmp_path / "links")[0] == 0
    for name in ("outer_12", "outer_23", "outer_31"):
        assert ((tmp_path / f"links/earlier_1/{name}.safetensors").read_bytes()
                == (PROJECT / f"tiny/outer/{name}.safetensors").read_bytes())
    assert (tmp_path / "keep.txt").read_text() == "mine"
    for odd in ([{}], 3, [3]):
        (tmp_path / "links/outerlink_config.json").write_text(json.dumps({"adapters": odd}))
        code, _, errors = run(train_outer, *OUTER, "--save_dir", tmp_path / "links")
        assert code == 2 and len(errors) == 1 and "is not {adapters: [" in errors[0]


def test_a_training_moves_the_earlier_one_aside(tmp_path, run):
    """All of it, and nothing else. --resume moves nothing."""
    mine = tmp_path / "my_notes.txt"
    mine.write_text("keep me")
    (tmp_path / "parts").mkdir()
    assert run(train_outer, *OUTER, "--save_dir", tmp_path)[0] == 0
    (tmp_path / "earlier_1").rename(tmp_path / "earlier_7")
    (tmp_path / "summary.json").write_text("{}")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert first.keys() >= {"train_args.json", "log.jsonl", "state.pt", "outerlink_config.json",
                            "outer_12.safetensors", "outer_23.safetensors", "outer_31.safetensors"}
    code, said, _ = run(train_outer, *OUTER, "--seed", 1, "--save_format", "pt", "--save_dir",
                        tmp_path)
    assert code == 0 and f"is in {tmp_path / 'earlier_8'} now" in said
    del first["my_notes.txt"]
    aside = {path.name: path.read_bytes() for path in (tmp_path / "earlier_8").iterdir()}
    assert aside == first
    assert mine.exists() and not list(tmp_path.glob("*.safetensors"))
    assert run(train_outer, *OUTER, "--seed", 1, "--save_format", "pt", "--save_dir", tmp_path,
               "--resume")[0] == 0
    assert not (tmp_path / "earlier_9").exists()


def test_links_for_two_tasks_share_a_folder(tmp_path, run):
    """An agent may have an inner link for code beside the one for all other questions."""
    style = tmp_path / "by_task.py"
    style.write_text("import dataclasses\nfrom styles.tiny import tiny\nby_task = "
                     "dataclasses.replace(tiny, name='by_task', links_by_task=True)\n")
    ask = ["--style", style, *QUICK, "--dataset_name", "tiny", "--latent_length", 2, "--text",
           "gold", "--save_dir", tmp_path / "link"]
    for kind in ("math", "code", "code"):
        assert run(train_inner, *ask, "--mas_task", kind)[0] == 0
    links = {str(path.relative_to(tmp_path / "link")) for path in tmp_path.rglob("adapter(*")}
    assert links == {"adapter(math).safetensors", "adapter(code).safetensors",
                     "earlier_2/adapter(code).safetensors"}
    for kind in ("math", "code"):
        load_inner(tmp_path / "link", 96, kind)


def test_links_know_their_prompts(tmp_path, capsys, run):
    """A style with other words, asked with these links, is told apart in one line."""
    assert run(train_outer, *OUTER, "--save_dir", tmp_path)[0] == 0
    tiny = get_style("tiny")

    def changed(**fields):
        other = dataclasses.replace(tiny.roles[1], **fields)
        return dataclasses.replace(tiny, roles=(tiny.roles[0], other, tiny.roles[2]))

    for style, told in ((tiny, 0), (changed(prompt="{question} <|notes|> and {planner}"), 1),
                        (changed(first="{question} <|notes|> nothing"), 1),
                        (changed(system="be brief"), 1), (changed(target=("plan",)), 0)):
        load_mas_system(style, ckpt_override={"outer": tmp_path})
        line = f"the links in {tmp_path} were trained with other prompts or edges than those of"
        assert capsys.readouterr().out.count(line) == told


def test_links_that_sent_whole_texts_have_no_m(tmp_path, run):
    """Then m is the style's (6), and not the flag's default (32)."""
    assert run(train_outer, *OUTER, "--latents", "teacher", "--latent_length", 3, "--save_dir",
               tmp_path)[0] == 0
    assert load_mas_system("tiny", ckpt_override={"outer": tmp_path}).latent_length == 6
    code, said, _ = run(evaluate, "--ckpt_override", f"outer={tmp_path}", "--num_samples", 2,
                        "--method", "single", "--out", tmp_path / "asked")
    settings = json.loads((tmp_path / "asked/summary.json").read_text())["settings"]
    assert code == 0 and settings["latent_length"] == 6
    assert settings["num_recursive_rounds"] == [1] and "trained with num_recursive_rounds" in said


# ---- folders that cannot be written to ----------------------------------------------------------

@pytest.mark.parametrize("script, options, folder", [
    (train_outer, OUTER, "--save_dir"), (train_inner, QUICK, "--save_dir"),
    (evaluate, ["--num_samples", 2], "--out")])
def test_no_folder_is_one_line_before_the_work(script, options, folder, tmp_path, run):
    (tmp_path / "file").write_text("no folder")
    for name in ("file", "file/deeper"):
        code, said, errors = run(script, *options, folder, tmp_path / name)
        assert code == 2 and len(errors) == 1, errors
        assert f"{tmp_path / name} cannot be written to: name another folder" in errors[0]
        assert "device" not in said.replace("style tiny: device", "")       # no model was loaded
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.fixture
def room():
    """room(bytes): from now on no file can grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_found_before_the_work(tmp_path, run, room):
    room(1000)
    code, _, errors = run(train_outer, *OUTER, "--save_dir", tmp_path / "out")
    room(resource.RLIM_INFINITY)
    assert code == 2 and len(errors) == 1 and "or make room: " in errors[0]


def test_links_are_written_before_the_state(tmp_path, run, room):
    """Where the disk has room for the links and not for state.pt, the links are there and whole."""
    assert run(train_outer, *OUTER, "--save_dir", tmp_path / "all")[0] == 0
    links, state = ((tmp_path / "all" / name).stat().st_size
                    for name in ("outer_12.safetensors", "state.pt"))
    assert state > 2.5 * links
    room(2 * links)
    code, _, errors = run(train_outer, *OUTER, "--save_dir", tmp_path / "out")
    room(resource.RLIM_INFINITY)
    assert code == 2 and len(errors) == 1 and "state.pt could not be written: " in errors[0]
    for name in ("outer_12", "outer_23", "outer_31"):
        assert ((tmp_path / f"out/{name}.safetensors").read_bytes()
                == (tmp_path / f"all/{name}.safetensors").read_bytes())
    assert not list((tmp_path / "out").glob("*.part")) and not (tmp_path / "out/state.pt").exists()


def test_files_get_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o022)
    save_inner(InnerLink(4), tmp_path)
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_a_file_is_whole_or_not_there(tmp_path):
    def half(part):
        part.write_text("half")
        raise RuntimeError("torn")

    files.write_json(tmp_path / "it.json", {"a": 1})
    with pytest.raises(OSError, match="it.json could not be written: RuntimeError: torn"):
        files.write_whole(tmp_path / "it.json", half)
    assert json.loads((tmp_path / "it.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]


# ---- damaged states -----------------------------------------------------------------------------

@pytest.mark.parametrize("damage, complaint", [
    (lambda state: state.pop("optimizer"), "not a state of this script, or damaged: KeyError"),
    (lambda state: state.pop("done"), "not a state of this script, or damaged: KeyError"),
    (lambda state: state.update(links={}), "is not a state of these links"),
    (lambda state: state.update(settings=3), "not a state of this script, or damaged: TypeError")])
def test_a_state_without_its_parts_is_one_line(damage, complaint, tmp_path, run):
    assert run(train_outer, *OUTER, "--save_dir", tmp_path)[0] == 0
    state = torch.load(tmp_path / "state.pt")
    damage(state)
    torch.save(state, tmp_path / "state.pt")
    code, _, errors = run(train_outer, *OUTER, "--save_dir", tmp_path, "--resume")
    assert code == 2 and len(errors) == 1 and complaint in errors[0], errors


def test_foreign_lines_in_a_part_are_asked_again(tmp_path, run):
    ask = [evaluate, "--num_samples", 4, "--method", "latent", "--num_recursive_rounds", 1, "--out",
           tmp_path]
    assert run(*ask)[0] == 0
    before = [json.loads(line)["outputs"] for line in open(tmp_path / "results.jsonl")]
    part, = (tmp_path / "parts").iterdir()
    for content in ({"lines": [1, 2, 3, 4]}, {"lines": ["x"] * 4}, {"lines": [None]}, {"lines": 3},
                    {"lines": None}, [1], "torn"):
        part.write_text("{torn" if content == "torn" else json.dumps(content))
        assert run(*ask, "--resume")[0] == 0
        assert before == [json.loads(line)["outputs"] for line in open(tmp_path / "results.jsonl")]
