"""What holds where the user says nothing, and what a user's slip is answered with."""
import json
import shutil
from unittest.mock import Mock

from helpers import PROJECT, load_mas_system, refuses

import evaluate
import tasks
from evaluation import report
from styles import get_style
from support.errors import say_once
from tasks import get_task
from training.rows import flags_to_ask


def test_a_participants_task_is_asked_as_in_training(shipped, tmp_path, run, monkeypatch):
    """By its m, and greedily: by evaluate.py, and by the trainer at its end."""
    shutil.copy(PROJECT / "tests/data/chain.txt", tmp_path / "chain.py")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    run(evaluate, "--dataset", "chain", "--num_samples", 8, "--method", "latent", "--out", tmp_path,
        "--num_recursive_rounds", 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][0]["accuracy"] == 1 and summary["settings"]["max_new_tokens"] == 32
    monkeypatch.setattr(evaluate, "evaluate", Mock())
    args = Mock(eval_samples=8, num_recursive_rounds=1, seed=1)
    evaluate.compare(shipped, get_task("chain"), args, tmp_path)
    assert evaluate.evaluate.call_args.kwargs["plan"].writing.max_new_tokens == 32
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--style", "duo", "--dataset", "chain"])
    args = evaluate.parse()[0]
    assert (args.latent_length, args.num_recursive_rounds, args.temperature) == (8, [1], 0)
    assert evaluate.m_and_rounds({"num_recursive_rounds": 2}) == {"num_recursive_rounds": [1, 2]}


def test_a_foreign_m_is_told_once(shipped, capsys):
    """R and m swapped are the usual slip. Methods in words have no m."""
    say_once.cache_clear()
    for method, m, told in (("text", 3, 0), ("latent", 6, 0), ("latent", 3, 1), ("latent", 3, 0)):
        shipped.request(["start 2 s1 x7"], 6, m, method=method)
        said = capsys.readouterr().out
        assert said.count("\n") == told and ("3" in said and "6" in said) == told


def test_the_trainers_last_line_names_questions_like_those_of_the_training():
    for style, kind, flags in (("sequential_light", "code", "mbppplus"), ("duo", "math", "gsm8k"),
                               ("relay", "math", "relay"), ("duo", "search", "FILE --task")):
        assert f"--dataset {flags}" in flags_to_ask(None, get_style(style).settings, kind)


def test_a_style_file_may_import_the_file_beside_it(tmp_path):
    """Its last style counts, and those that it only imports do not."""
    (tmp_path / "helper.py").write_text("NAME = 'beside'\n")
    (tmp_path / "mine.py").write_text("from dataclasses import replace\nimport helper\nfrom styles."
                                      "relay import relay\nfirst = replace(relay, name='first')\n"
                                      "mine = replace(first, name=helper.NAME)\n"
                                      "from styles.tiny import tiny\n")
    assert get_style(str(tmp_path / "mine.py")).name == "beside"


def test_arguments_that_mean_nothing_are_named():
    with refuses("None"):
        load_mas_system(None)
    with refuses("maths"):
        load_mas_system("tiny", task="maths")
    for name in ("tiny", "relay", "math500"):
        with refuses("-1", "None"):
            get_task(name).load(-1)


def test_fewer_nats_are_better(tmp_path, capsys):
    costs = {"decoded_tokens": 4, "latent_steps": 6, "peak_memory_mb": 1.0, "correct": []}
    lines = [{"style": "", "dataset": "", "method": method, "rounds": 1, "id": i, "outputs": ["x"],
              "nats": nats, "seconds": time, **costs} for i in range(3)
             for method, nats, time in (("text", 2.0, 3.0), ("latent", max(i, 1), 2.0))]
    report.write_report(report.summarise(lines), tmp_path, {})
    said = capsys.readouterr().out
    assert "better in 2, worse in 0" in said and "unparsed" not in said
    assert "text takes 1.50 times as long" in said
