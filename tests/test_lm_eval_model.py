"""bench/lm_eval_model.py: the harness gets what the system itself says and computes."""
import json
from types import SimpleNamespace

import pytest
from helpers import PROJECT, QUESTIONS, fast, refuses, write_rows

from evaluation.answers import Job, Plan, losses_of
from tasks import Example
from writing import Sampling, Writing

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval: see docs/benchmarks.md")
from bench import lm_eval_model as ours  # noqa: E402


@pytest.mark.parametrize("method", fast("latent", "shuffle", of=ours.CHOICES))
def test_two_tasks_of_the_harness(method, tmp_path, double):
    """Texts are those of MAS.answer. Likelihoods are --measure loss times the number of words.
    Greedy is a beginning of the answer, and nothing else. (YAML reads JSON.)"""
    order = sorted(QUESTIONS, key=len)                             # as in the batch of `shuffle`
    mas = double.with_fresh_outer(seed=5) if method == "untrained" else double
    name = "latent" if method == "untrained" else method
    said = mas.answer(order, 2, 3, method=name, max_new_tokens=12)
    choices = [[" ".join(text.split()[:3]), "s1 +1", text.split()[0] + " start"] for text in said]
    rows = [{"question": one, "choices": three, "said": text.split(" .")[0]}
            for one, three, text in zip(order, choices, said)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"data_files": {"test": file}, "cache_dir": str(tmp_path)}
    for task in json.loads((PROJECT / "tests/data/harness_tasks.json").read_text()):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**task, "dataset_kwargs": data}))
    found = lm_eval.simple_evaluate(
        ours.RecursiveMAS(double, method, rounds=2, latent_length=3, batch_size=8, seed=5,
                          max_gen_toks=12), tasks=["writes", "chooses"], bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False))
    wrote, chose = (found["samples"][task] for task in ("writes", "chooses"))
    assert [one["resps"] for one in wrote] == [[[row["said"]]] for row in rows]
    assert said != [row["said"] for row in rows]                   # something was cut off
    for i in range(3):
        examples = [Example("", *pair, "math") for pair in zip(order, [one[i] for one in choices])]
        lines = losses_of(mas, Job(None, Plan([], [], 3, 8, Writing(12)), name, 2, examples))
        for one, line, text in zip(chose, lines, said, strict=True):
            (likelihood, greedy), own = one["resps"][i][0], line["outputs"][0]
            assert float(likelihood) == pytest.approx(-line["nats"] * len(own.split()), rel=1e-9)
            assert (str(greedy) == "True") == text.startswith(own)


def test_requests_that_are_equal_or_refused(shipped):
    """K equal ones are K samples of one question, those of respond()."""
    model, given = ours.RecursiveMAS(shipped, seed=3), {"temperature": 3.0, "max_gen_toks": 9}
    found = model.generate_until([SimpleNamespace(args=(QUESTIONS[0], given))] * 4)
    assert len(set(found)) > 1 and found == shipped.respond(
        [QUESTIONS[0]], writing=Writing(9, Sampling(3.0), seed=3, samples=4))[0]
    for wrong in ({"method": "brief"}, {"batch_size": "auto"}, {"stile": "stile"}, {"kind": "maths"}):
        with refuses(*wrong.values()):
            ours.RecursiveMAS(shipped, **wrong)
    for ask in (model.generate_until, model.loglikelihood_rolling, model.chat_template):
        with refuses("beams" if ask == model.generate_until else ask.__name__):
            ask([SimpleNamespace(args=("start 1", {"beams": 2}))])
