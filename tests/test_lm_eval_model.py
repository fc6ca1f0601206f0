"""bench/lm_eval_model.py: the harness gets what the system itself says and computes."""
import json
import re
import sys
from types import SimpleNamespace

import pytest
from helpers import PROJECT, QUESTIONS, fast, refuses, write_rows

from evaluation.answers import Job, Plan, losses_of
from tasks import Example
from writing import Sampling, Writing

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval: see docs/benchmarks.md")
from lm_eval.tasks import TaskManager  # noqa: E402

from bench import lm_eval_model  # noqa: E402
from bench.lm_eval_model import CHOICES, RecursiveMAS  # noqa: E402


def write_tasks(folder, rows):
    """Two tasks of the harness over the same rows, as files (YAML reads JSON)."""
    data = {"data_files": {"test": write_rows(folder / "rows.jsonl", rows)},
            "cache_dir": str(folder)}
    for name, task in json.loads((PROJECT / "tests/data/harness_tasks.json").read_text()).items():
        (folder / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test",
            "doc_to_text": "{{question}}", **task}))


@pytest.mark.parametrize("method", fast("latent", "shuffle", of=CHOICES))
def test_two_tasks_of_the_harness(method, tmp_path, double):
    """Texts are those of MAS.answer. Likelihoods are --measure loss times the number of words.
    Greedy is a beginning of the answer, and nothing else."""
    order = sorted(QUESTIONS, key=len)                             # as in the batch of `shuffle`
    mas = double.with_fresh_outer(seed=5) if method == "untrained" else double
    name = "latent" if method == "untrained" else method
    said = mas.answer(order, 2, 3, method=name, max_new_tokens=12)
    choices = [[" ".join(text.split()[:3]), "s1 +1", text.split()[0] + " start"] for text in said]
    write_tasks(tmp_path, [{"question": one, "choices": three, "said": text.split(" .")[0]}
                           for one, three, text in zip(order, choices, said)])
    found = lm_eval.simple_evaluate(
        RecursiveMAS(double, method, rounds=2, latent_length=3, batch_size=8, max_gen_toks=12,
                     seed=5), tasks=["writes", "chooses"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert any(" ." in text for text in said) and [
        one["resps"] for one in found["samples"]["writes"]] == [
        [[text.split(" .")[0]]] for text in said]
    assert found["results"]["writes"]["exact_match,none"] == 1
    for i in range(3):
        examples = [Example("", *pair, "math") for pair in zip(order, [one[i] for one in choices])]
        lines = losses_of(mas, Job(None, Plan([], [], 3, 8, Writing(12)), name, 2, examples))
        for one, line, text in zip(found["samples"]["chooses"], lines, said, strict=True):
            (likelihood, greedy), = one["resps"][i]
            own = line["outputs"][0]
            assert float(likelihood) == pytest.approx(-line["nats"] * len(own.split()), rel=1e-9)
            assert (str(greedy) == "True") == text.startswith(own)


def test_requests_that_are_equal_or_refused(shipped):
    """K equal ones are K samples of one question, those of respond()."""
    ask, given = SimpleNamespace, {"temperature": 3.0, "max_gen_toks": 9, "until": "zzz"}
    model = RecursiveMAS(shipped, seed=3)
    found = model.generate_until([ask(args=(QUESTIONS[0], given))] * 4)
    assert len(set(found)) > 1 and found == shipped.respond(
        [QUESTIONS[0]], writing=Writing(9, Sampling(3.0), seed=3, samples=4))[0]
    for named, wrong in (
            ("text_brief", lambda: RecursiveMAS(shipped, method="text_brief")),
            ("auto", lambda: RecursiveMAS(shipped, batch_size="auto")),
            ("stile", lambda: RecursiveMAS(shipped, stile=1)),
            ("maths", lambda: RecursiveMAS(shipped, kind="maths")),
            ("beams", lambda: model.generate_until([ask(args=("start 1", {"beams": 2}))])),
            ("rolling", lambda: model.loglikelihood_rolling([ask(args=("start 1",))])),
            ("apply_chat_template", lambda: model.chat_template(True))):
        with refuses(named):
            wrong()


@pytest.mark.slow                   # the harness looks through its thousands of tasks first
def test_the_command(tmp_path, run, monkeypatch):
    write_tasks(tmp_path, [{"question": QUESTIONS[0], "choices": ["s1 x7 1", "s1"], "said": ""}])
    monkeypatch.setattr(sys, "path", [*sys.path])        # it takes the project's folder out
    code, printed, _ = run(lm_eval_model, "--model_args", "style=tiny,method=single", "--tasks",
                           "chooses", "--include_path", tmp_path)
    assert code == 0 and re.search(r"chooses.*\|acc", printed)
