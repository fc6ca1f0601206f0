"""Do the tests notice when a line is wrong? A mutant is the project with one line spoilt.

    python tests/mutants.py              all of them: some twenty minutes
    python tests/mutants.py 1 7 12       these alone

Each line of MUTANTS is a file, a text that stands in it once, the text to put there, the test file
that should fail, and words that choose its tests (pytest -k). A mutant that LIVES is a behaviour
that no test guards. pytest does not collect this file.
"""
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
OUTER, LOOP = "train_outer.py", "training/loop.py"
STEP = "scaler.step(optimizer)\n            schedule.step()"
INNER_STEP = "optimizer.step()\n            schedule.step()"
MUTANTS = [
    # One agent.
    ("agents.py", "<= len(going) // 2", "< 0", "agents", "end_early"),      # no text leaves
    ("agents.py", "draws[going, step]", "draws[:len(going), step]", "agents", "sampling_batched"),
    ("agents.py", "mask.cumsum(1) - 1", "torch.ones_like(mask).cumsum(1) - 1", "agents", "prefix"),
    ("agents.py", "(self.gaps or mask.all())", "True", "agents", "prefix"),
    ("agents.py", "if prefix and all(", "if False and all(", "agents", "latents_after"),
    ("agents.py", "tokens[-max(map(len, stop)) - 1:]", "tokens[-1:]", "agents", "stop_strings"),
    ("agents.py", "apply_link(self.inner, thoughts[-1], self.dtype)", "thoughts[-1]", "agents",
     "think_batched"),
    ("agents.py", "self.embedding(ids), context.fork()", "self.embedding(ids), context.cache",
     "agents", "never_changed"),
    ("cache.py", "setattr(layer, name, dict(value))", "pass", "agents", "never_changed"),
    ("cache.py", "self.mask.device), self.fork()", "self.mask.device), self.cache", "agents",
     "picked"),
    ("gpu/recorded.py", "self.column.add_(1)", "pass", "agents", "buffers"),
    ("gpu/recorded.py", "fixed.keys.zero_()[", "fixed.keys[", "agents", "nothing_behind"),
    ("gpu/recorded.py", "and context.cache is not self.cache", "", "agents", "outgrown"),
    ("gpu/recorded.py", "tensor.copy_(value)", "pass", "compiled", "plain_step"),
    # Prompts, words, the recursion.
    ("prompts.py", "LOOSE = 3", "LOOSE = 0", "recurse", "read_once"),
    ("prompts.py", "self.request.rounds > 1 or", "", "recurse", "read_once"),
    ("writing.py", "turn.role, turn.round,", "turn.role,", "recurse", "own_seed"),
    ("writing.py", "- draft.decoded for", "for", "recurse", "own_words"),
    ("writing.py", "min(writing.brief, limit)", "writing.brief", "recurse", "never_lengthens"),
    ("writing.py", "(writing.samples * writing.repeats)", "writing.samples", "recurse", "samples"),
    ("recurse.py", "if trace and not in_words:", "if trace:", "recurse", "trace"),
    ("recurse.py", "if trace:", "if True:", "recurse", "trace"),
    ("recurse.py", "if trace:", "if trace and role.name in {edge.src for edge in style.edges}:",
     "recurse", "nobody"),
    ("recurse.py", "apply_link(source.inner, said, source.dtype)", "said", "recurse", "latent_is"),
    ("link.py", "return self.post_ln(y)", "return y", "link", "equation"),
    ("link.py", "nn.init.constant_(self.ln_target.weight, gain)", "pass", "link", "gain"),
    # Training.
    (LOOP, "gradient /= tokens", "gradient /= 1", "train", ""),
    (LOOP, "name: total / tokens for", "name: total for", "train", ""),
    (LOOP, "torch.distributed.all_reduce(tensor)", "pass", "ranks", ""),
    (LOOP, "[rank()::ranks()]", "[0::ranks()]", "ranks", ""),
    (LOOP, "part.load_state_dict(saved[name])",
     'name == "optimizer" or part.load_state_dict(saved[name])', "train", "resume"),
    (LOOP, "min(args.warmup_steps, steps)", "0", "train", ""),
    ("training/rows.py", "texts[min(round, len(texts)) - 1]", "texts[0]", "train", ""),
    ("training/warm_start.py", "NOISE * rms * noise", "0 * rms * noise", "train", "warm"),
    ("training/warm_start.py", "not in leave_out]", "not in ()]", "train", "warm"),
    ("training/warm_start.py", "cosine + contrast(", "cosine + 0 * contrast(", "train", "warm"),
    ("train_inner.py", INNER_STEP, "optimizer.step()", "train", ""),
    ("train_inner.py", INNER_STEP, "schedule.step()\n            optimizer.step()", "train", ""),
    ("train_inner.py", "args.max_grad_norm or math.inf", "math.inf", "train", ""),
    ("train_inner.py", "(loss * weight).backward()", "loss.backward()", "train", ""),
    (OUTER, STEP, "scaler.step(optimizer)", "train", ""),
    (OUTER, STEP, "schedule.step()\n            scaler.step(optimizer)", "train", ""),
    (OUTER, "args.max_grad_norm or math.inf", "math.inf", "train", ""),
    (OUTER, "outcome.loss * weight).backward", "outcome.loss).backward", "train", ""),
    (OUTER, '"rounds {args.seed} {step}"', '"rounds {args.seed} {step} {rank()}"', "ranks", ""),
    (OUTER, "/ (1 + w * len(role_losses))", "", "train", ""),
    ("evaluation/gradients.py", ".item() * count / scale", ".item() / scale", "train", "gradient"),
    (OUTER, "start, length = 1, args", "start, length = 0, args", "train", ""),
    # Evaluation.
    ("evaluation/answers.py", "torch.cuda.empty_cache()", "pass", "evaluate", "halved"),
    ("evaluation/answers.py", "[i // job.plan.writing.samples]", "[i % len(job.examples)]",
     "benchmarks", "samples"),
    ("evaluation/answers.py", "sum(i // K == b for", "sum(1 for", "benchmarks", "samples"),
    ("evaluation/statistics.py", "RandomState([0])", "RandomState()", "evaluate", "bootstrap"),
]


def fate(folder, file, old, new, tests, chosen):
    """Whether the tests notice: "killed", "LIVES", or what went wrong."""
    path = folder / file
    text = path.read_text()
    if text.count(old) != 1:
        return f"stands there {text.count(old)} times"
    path.write_text(text.replace(old, new))
    command = ["-m", "pytest", "-x", "-q", "-n", "0", "-m", "", f"tests/test_{tests}.py"]
    done = subprocess.run([sys.executable, *command, "-k", chosen], cwd=folder,
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
            file, old, new, tests, chosen = MUTANTS[number - 1]
            started = time.time()
            fates.append(fate(folder, file, old, new, tests, chosen))
            print(f"{fates[-1]:8s}{number:3d}  {file}: {old!r} -> {new!r}  ({tests} {chosen}, "
                  f"{time.time() - started:.0f} s)", flush=True)
    print(f"{fates.count('killed')} of {len(fates)} mutants are killed")


if __name__ == "__main__":
    main()
