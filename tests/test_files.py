"""A folder belongs to one run, files are whole or not there, and a full disk is found early.

Where a lock is concerned, scripts run in processes of their own, as two users would start them.
"""
import dataclasses
import errno
import fcntl
import json
import multiprocessing.connection
import os
import resource
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
from helpers import PROJECT, Script, lines_of, links_of, randomise, refuses

import evaluate
import train_inner
import train_outer
from checkpoints import load_inner, save_inner
from evaluation.answers import write_part
from link import InnerLink
from recurse import load_mas_system
from styles import get_style
from support import files

SHORT = ["--num_samples", 8, "--batch_size", 2, "--max_steps", 2, "--latent_length", 2]
OUTER = [*SHORT, "--warm_start_steps", 1, "--eval_samples", 0, "--num_recursive_rounds", 1]
DATA = PROJECT / "tests/data"
ASK = ["--num_samples", 4, "--method", "latent", "--num_recursive_rounds", 1]


# ---- one run, one folder ------------------------------------------------------------------------

def owner_of(folder):
    """A process that has claimed the folder, and lives on."""
    process = Script(DATA / "owner.txt", folder)
    process.wait_for(process.stdout)
    return process


@pytest.fixture(autouse=True)
def nothing_stays_claimed():
    yield
    files.release()


@pytest.mark.parametrize("script, options, folder", [
    ("train_outer.py", [*OUTER, "--save_steps", 1, "--max_steps", 10**4], "--save_dir"),
    ("evaluate.py", ["--num_samples", 200, "--batch_size", 2], "--out")])
def test_two_processes_in_one_folder(script, options, folder, tmp_path):
    """One is refused. The other one goes on, and when it is stopped, it says where it goes on."""
    folder, options = tmp_path / "out", [*options, folder, tmp_path / "out"]
    both = [Script(script, *options) for _ in range(2)]
    multiprocessing.connection.wait([one.process.sentinel for one in both], 240)
    refused, owner = sorted(both, key=Script.runs)
    error, = (line for line in refused.stderr().splitlines() if line.startswith("error"))
    assert refused.wait() == 2 and str(folder) in error and "Traceback" not in refused.stderr()
    owner.wait_for(lambda: [*folder.glob("state.pt"), *folder.glob("parts/*.json")])
    with pytest.raises(ValueError, match=str(folder)):
        files.claim(folder)
    owner.send(signal.SIGINT)
    assert owner.wait() == 130
    assert str(folder) in owner.stderr().splitlines()[-1] and "Traceback" not in owner.stderr()
    assert not list(folder.glob("earlier_*")) and not (folder / ".lock").exists()


def test_a_run_that_is_stopped_early_says_that_nothing_is_saved(tmp_path):
    """Here in the warm start, with the state of an earlier run in the folder."""
    (tmp_path / "state.pt").write_text("of an earlier run")
    process = Script("train_outer.py", "--warm_start_steps", 10**6, "--save_dir", tmp_path)
    process.wait_for(lambda: "warm start" in process.stderr())
    process.send(signal.SIGINT)
    assert process.wait() == 130
    last = process.stderr().splitlines()[-1]
    assert last.startswith("stopped") and str(tmp_path) not in last
    assert (tmp_path / "state.pt").read_text() == "of an earlier run"


def test_a_lock_belongs_to_the_living_process_that_made_it(tmp_path):
    """Somebody deletes our lock, and another run makes a new one. Our release() leaves it alone."""
    folder = tmp_path / "out"
    files.claim(folder)
    (folder / ".lock").unlink()
    process = owner_of(folder)
    files.release()
    with pytest.raises(ValueError, match=str(folder)):
        files.claim(folder)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (folder / ".lock").exists()
    files.claim(folder)
    files.release()
    assert not folder.exists()             # nothing was written there


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_in_one_line(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, "no")))
    files.claim(tmp_path / "out")
    said = capsys.readouterr().out
    assert str(tmp_path / "out") in said and "without locks" in said and said.count("\n") == 1
    files.release()
    assert not (tmp_path / "out").exists()


def test_nothing_outside_is_written_through_a_link(tmp_path, run):
    """Two links are refused in one line, and all others are replaced by files."""
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in (".lock", "parts"):
        link = tmp_path / "out" / name
        link.symlink_to(tmp_path / "mine")
        with refuses(link, kind=OSError):
            files.claim(tmp_path / "out")
        link.unlink()
    for name in ("own_texts.rank0.jsonl", "hidden_states.rank0.bin", "log.jsonl", "state.pt"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    assert run(train_inner, *SHORT, "--text", "own", "--held_out", 2, "--save_dir",
               tmp_path / "out")[0] == 0 and (tmp_path / "mine").read_text() == "mine"


# ---- what an earlier run left -------------------------------------------------------------------

def test_links_without_notes_and_odd_manifests_are_moved_aside_too(tmp_path, run):
    """Released links have no train_args.json. No name of a manifest leads out of the folder."""
    shutil.copytree(PROJECT / "tiny/outer", tmp_path / "links")
    (tmp_path / "keep.txt").write_text("mine")
    manifest = tmp_path / "links/outerlink_config.json"
    config = json.loads(manifest.read_text())
    config["adapters"].append({"filename": "../keep.txt"})
    manifest.write_text(json.dumps(config))
    assert run(train_outer, *OUTER, "--save_dir", tmp_path / "links")[0] == 0
    assert links_of(tmp_path / "links/earlier_1") == links_of(PROJECT / "tiny/outer")
    assert (tmp_path / "keep.txt").read_text() == "mine"
    for odd in ([{}], 3, [3]):
        manifest.write_text(json.dumps({"adapters": odd}))
        code, _, errors = run(train_outer, *OUTER, "--save_dir", tmp_path / "links")
        assert code == 2 and len(errors) == 1 and str(manifest) in errors[0]


def test_a_training_moves_the_earlier_one_aside(tmp_path, run):
    """All of it, and nothing else. --resume moves nothing."""
    ask = [train_outer, *OUTER, "--save_dir", tmp_path]
    (tmp_path / "my_notes.txt").write_text("keep me")
    (tmp_path / "parts").mkdir()
    assert run(*ask)[0] == 0
    (tmp_path / "earlier_1").rename(tmp_path / "earlier_7")
    (tmp_path / "summary.json").write_text("{}")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert first.keys() >= {"train_args.json", "log.jsonl", "state.pt", "outerlink_config.json",
                            "outer_12.safetensors", "outer_23.safetensors", "outer_31.safetensors"}
    code, said, _ = run(*ask, "--seed", 1, "--save_format", "pt")
    assert code == 0 and str(tmp_path / "earlier_8") in said
    del first["my_notes.txt"]
    aside = {path.name: path.read_bytes() for path in (tmp_path / "earlier_8").iterdir()}
    assert aside == first
    assert (tmp_path / "my_notes.txt").exists() and not list(tmp_path.glob("*.safetensors"))
    assert run(*ask, "--seed", 1, "--save_format", "pt", "--resume")[0] == 0
    assert not (tmp_path / "earlier_9").exists()


def test_links_for_two_tasks_share_a_folder(tmp_path, run):
    """An agent may have an inner link for code beside the one for all other questions."""
    style = shutil.copy(DATA / "by_task.txt", tmp_path / "by_task.py")
    ask = ["--style", style, *SHORT, "--held_out", 2, "--save_dir", tmp_path / "link"]
    for kind in ("math", "code", "code"):
        assert run(train_inner, *ask, "--mas_task", kind)[0] == 0
    links = {str(path.relative_to(tmp_path / "link")) for path in tmp_path.rglob("adapter(*")}
    assert links == {"adapter(math).safetensors", "adapter(code).safetensors",
                     "earlier_2/adapter(code).safetensors"}
    for kind in ("math", "code"):
        load_inner(tmp_path / "link", 96, kind)


def test_links_know_their_prompts_and_their_m(tmp_path, capsys, run):
    """A style with other words, asked with these links, is told apart in one line. These links sent
    whole texts, so their m is the style's (6), and neither 3 nor the flag's default (32)."""
    assert run(train_outer, *OUTER, "--latents", "teacher", "--latent_length", 3, "--save_dir",
               tmp_path)[0] == 0
    planner, critic, solver = get_style("tiny").roles
    for other in lines_of("other_words.jsonl"):
        roles = planner, dataclasses.replace(critic, **other["critic"]), solver
        mas = load_mas_system(dataclasses.replace(get_style("tiny"), roles=roles),
                              ckpt_override={"outer": tmp_path})
        assert mas.latent_length == 6
        assert (f"{tmp_path} were trained with" in capsys.readouterr().out) == other["told"]
    code, said, _ = run(evaluate, "--ckpt_override", f"outer={tmp_path}", "--num_samples",
                        2, "--method", "single", "--out", tmp_path / "asked")
    settings = json.loads((tmp_path / "asked/summary.json").read_text())["settings"]
    assert code == 0 and settings["latent_length"] == 6
    assert settings["num_recursive_rounds"] == [1] and "num_recursive_rounds=[1]" in said


def test_outer_links_know_their_inner_links(tmp_path, capsys, run, monkeypatch):
    """Not by their path: what stands there may have changed, or all may have moved together."""
    links = [randomise(InnerLink(96), 0.2, seed) for seed in (1, 2)]
    save_inner(links[0], tmp_path / "inner", None)
    monkeypatch.chdir(tmp_path)
    flags = ["--planner_inner_aligner_path", "inner", "--save_dir", "outer"]
    assert run(train_outer, *OUTER, *flags)[0] == 0
    for name in ("inner", "outer"):
        shutil.copytree(name, tmp_path / "away/there" / name)
    save_inner(links[1], "away/inner", None)              # another one, where the path would lead
    monkeypatch.chdir(tmp_path / "away")

    def planner(**given):
        mas = load_mas_system("tiny", device="cpu", ckpt_override={"outer": "there/outer", **given})
        return [torch.equal(mas.agents["planner"].inner.proj1.weight, link.proj1.weight)
                for link in links], "there/outer were" in capsys.readouterr().out

    assert planner() == ([True, False], False)
    save_inner(links[1], "there/inner", None)
    code, _, errors = run(evaluate, *ASK, "--ckpt_override", "outer=there/outer")
    assert code == 2 and len(errors) == 1 and "planner: the inner link in there/inner" in errors[0]
    assert planner(planner="there/inner") == ([False, True], True)
    assert planner(planner=tmp_path / "inner") == ([True, False], False)
    notes = files.read_json("there/outer/train_args.json")      # and one of an earlier revision:
    files.write_json("there/outer/train_args.json", {**notes, "inner_links": {}})
    assert planner() == ([False, True], False)


# ---- folders that cannot be written to ----------------------------------------------------------

@pytest.mark.parametrize("script, options", [
    (train_outer, [*OUTER, "--save_dir"]), (train_inner, [*SHORT, "--save_dir"]),
    (evaluate, [*ASK, "--out"])])
def test_no_folder_is_one_line_before_the_work(script, options, tmp_path, run):
    (tmp_path / "file").write_text("no folder")
    for name in ("file", "file/deeper"):
        code, said, errors = run(script, *options, tmp_path / name)
        assert code == 2 and len(errors) == 1 and str(tmp_path / name) in errors[0]
        assert "frozen models" not in said                                  # no model was loaded
    assert (tmp_path / "file").read_text() == "no folder"
    (tmp_path / "link").symlink_to(PROJECT / "tiny")
    for name in (os.path.relpath(PROJECT / "tiny/new"), tmp_path / "link/new"):         # shipped
        code, _, errors = run(script, *options, name)
        assert code == 2 and len(errors) == 1 and str(name) in errors[0]
    assert not (PROJECT / "tiny/new").exists()


@pytest.fixture
def room():
    """room(bytes): from now on no file can grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_found_before_the_work_and_spares_the_links(tmp_path, run, room):
    """Where the disk has room for the links and not for state.pt, the links are there and whole."""
    ask, out = [train_outer, *OUTER, "--save_dir"], tmp_path / "out"
    room(1000)
    code, said, errors = run(*ask, out)
    room(resource.RLIM_INFINITY)
    assert code == 2 and len(errors) == 1 and str(out) in errors[0]
    assert "frozen models" not in said and not out.exists()
    assert run(*ask, tmp_path / "all")[0] == 0
    links, state = ((tmp_path / "all" / name).stat().st_size
                    for name in ("outer_12.safetensors", "state.pt"))
    assert state > 2.5 * links
    room(2 * links)
    code, _, errors = run(*ask, out)
    room(resource.RLIM_INFINITY)
    assert code == 2 and len(errors) == 1 and str(out / "state.pt") in errors[0]
    assert links_of(out) == links_of(tmp_path / "all")
    assert not list(out.glob("*.part")) and not (out / "state.pt").exists()


def test_a_file_is_whole_or_not_there(tmp_path):
    def half(part):
        part.write_text("half")
        raise RuntimeError("torn")

    before = os.umask(0o027)
    files.write_json(tmp_path / "it.json", {"a": 1})
    os.umask(before)
    assert (tmp_path / "it.json").stat().st_mode & 0o777 == 0o640
    with pytest.raises(OSError, match="it.json.*torn"):
        files.write_whole(tmp_path / "it.json", half)
    with open(tmp_path / "it.json") as reader:
        files.write_json(tmp_path / "it.json", {"b": 2})
        assert json.load(reader) == {"a": 1}            # who has begun to read, reads the old one
    assert files.read_json(tmp_path / "it.json") == {"b": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]


# ---- damaged files ------------------------------------------------------------------------------

def test_a_state_without_its_parts_is_one_line(tmp_path, run):
    ask = [train_outer, *OUTER, "--save_dir", tmp_path]
    assert run(*ask)[0] == 0
    right = torch.load(tmp_path / "state.pt")
    lacking = [{name: right[name] for name in right if name != gone}
               for gone in ("optimizer", "done")]
    for state in (*lacking, right | {"links": {}}, right | {"settings": 3}):
        torch.save(state, tmp_path / "state.pt")
        code, _, errors = run(*ask, "--resume")
        assert code == 2 and len(errors) == 1 and str(tmp_path / "state.pt") in errors[0], errors


def test_foreign_lines_in_parts_are_asked_again(tmp_path, run):
    """Each part is damaged in another way: as a whole, or in a value of its line. One is missing,
    one has failed, and one is whole and stays. The answers come out the same."""
    damages = (DATA / "foreign_parts.txt").read_text().splitlines()
    ask = [evaluate, *ASK, "--num_samples", len(damages) + 3, "--batch_size", 1, "--out", tmp_path]

    def outputs():
        return [json.loads(line)["outputs"] for line in open(tmp_path / "results.jsonl")]

    assert run(*ask)[0] == 0
    before, (kept, missing, failed, *parts) = outputs(), sorted((tmp_path / "parts").iterdir())
    written = kept.stat().st_mtime_ns
    missing.unlink()
    write_part(failed, [{**line, "error": ".."} for line in files.read_json(failed)["lines"]])
    (tmp_path / "parts/a.json.part").write_text("half")              # what kill -9 leaves behind
    for part, damage in zip(parts, damages, strict=True):
        if damage.startswith("but "):
            part_of = files.read_json(part)
            line, = part_of["lines"]
            damage = json.dumps({**part_of, "lines": [{**line, **json.loads(damage[4:])}]})
        part.write_text(damage)
    assert run(*ask, "--resume")[0] == 0
    assert outputs() == before and kept.stat().st_mtime_ns == written
    assert not files.read_json(failed)["lines"][0].get("error")
    code, _, [error] = run(*ask[:-1], tmp_path / "new", "--resume")
    assert code == 2 and str(tmp_path / "new") in error
