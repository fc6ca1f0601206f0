"""A whole system as a model of lm-evaluation-harness, which asks it hundreds of benchmarks.

    pip install lm_eval
    python -m bench.lm_eval_model --model_args style=sequential_light --tasks gsm8k --batch_size 8

The command is the harness's own (`lm_eval run`), with this model put in. So all of its flags work.
--model_args takes the arguments of RecursiveMAS below, and those of LOADING. In code:

    lm_eval.simple_evaluate(model=RecursiveMAS(load_mas_system("tiny")), tasks=["gsm8k"])

A benchmark asks in two ways. Both treat its text as the question, and put it into every role's
prompt, in the chat of that role's model.

    generate_until     the system answers, as in MAS.answer
    loglikelihood      how likely is this continuation? All turns up to the last one run, and then
                       the last agent reads the continuation, as in evaluate.py --measure loss

Perplexity of a whole text (loglikelihood_rolling) has no question, so it is refused.

Shapes: B questions, T tokens of a continuation.
"""
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from evaluation.answers import METHODS
from recurse import MAS, load_mas_system, recurse
from support import flags
from support.batches import by_length, chunks, progress
from support.errors import need
from writing import Sampling, Writing

NAME = "recursive_mas"
# More arguments of load_mas_system that --model_args may hold.
LOADING = ("dtype", "revision", "trust_remote_code", "threads", "offload", "compile")
# text_brief needs to know how long a note is, which no benchmark says.
CHOICES = [method for method in METHODS if method != "text_brief"]


@register_model(NAME)
class RecursiveMAS(LM):
    """One system, asked by one method.

    style: a name, a .py file, or a loaded MAS. method: one of CHOICES. kind: of all questions, for
    prompts and links (math, choice, code, search). rounds, latent_length: by default those of the
    links' training. outer: a folder of outer links, used instead of the style's own. max_gen_toks:
    words per text where the benchmark says nothing. The harness itself gives batch_size, device and
    max_batch_size (which only its `auto` uses). Raises ValueError for what cannot be served."""

    def __init__(self, style="tiny", method="latent", kind="math", rounds=None, latent_length=None,
                 outer="", batch_size=1, max_batch_size=None, device=None, max_gen_toks=256,
                 seed=42, **loading):
        super().__init__()
        odd = sorted(loading.keys() - set(LOADING))
        need(not odd, f"--model_args does not know {', '.join(odd)}: take style, method, kind, "
             f"rounds, latent_length, outer, max_gen_toks, seed, {', '.join(LOADING)}")
        need(method in CHOICES, f"method '{method}': choose one of {', '.join(CHOICES)}")
        need(str(batch_size).isdigit() and int(batch_size) > 0,
             f"--batch_size {batch_size}: give a number of at least 1")
        mas = style if isinstance(style, MAS) else load_mas_system(
            style, device or "auto", task=kind, ckpt_override={"outer": outer} if outer else None,
            need_links=method in ("latent", "shuffle"), **loading)
        self.mas = mas.with_fresh_outer(seed=seed) if method == "untrained" else mas
        self.batch_size = int(batch_size)
        self.asked = dict(rounds=rounds, latent_length=latent_length, kind=kind,
                          method="latent" if method == "untrained" else method)
        self.mas.request(["?"], **self.asked)              # complaints come before any benchmark
        self.writing = Writing(max_gen_toks, seed=seed)

    def batches(self, questions, name):
        """Different questions in batches of like length, with a progress bar."""
        numbers = by_length([len(one) for one in questions], self.batch_size)
        return progress([[questions[i] for i in batch] for batch in numbers], name)

    def generate_until(self, requests, disable_tqdm=False):
        """The system's answers to requests with args (question, settings of writing): texts.

        The harness asks for K samples by giving the same request K times. A text's random numbers
        come from its question, so K runs would write the same text: K samples are drawn at once."""
        keys = [(question, json.dumps(given, sort_keys=True))
                for question, given in (request.args for request in requests)]
        alike, written = defaultdict(list), {}   # {(settings, K): questions}, {key: its K texts}
        for (question, given), K in Counter(keys).items():
            alike[given, K].append(question)
        for (given, K), questions in alike.items():
            writing, until = self.how_to_write(json.loads(given), K)
            for batch in self.batches(questions, "answers"):
                # We do not stop at `until` while we write. What stands after it is cut off.
                texts = [postprocess_generated_text(text, until, None) for text in self.mas.respond(
                    self.mas.request(batch, **self.asked), writing=writing)[0]]    # B * K texts
                for b, question in enumerate(batch):
                    written[question, given] = iter(texts[b * K:(b + 1) * K])
        return [next(written[key]) for key in keys]

    def how_to_write(self, given, samples):
        """(Writing, where to cut a text) of a benchmark's settings, in the harness's names."""
        given = dict(normalize_gen_kwargs(given, self.writing.max_new_tokens))
        until, words, _ = (given.pop(name, None) for name in ("until", "max_gen_toks", "do_sample"))
        odd = sorted(given.keys() - vars(Sampling()).keys())
        need(not odd, f"the task's generation_kwargs hold {', '.join(odd)}, which is not served: "
             f"take until, max_gen_toks, do_sample, {', '.join(vars(Sampling()))}")
        return Writing(words, Sampling(**given), self.writing.seed, samples), until

    @torch.no_grad()
    def loglikelihood(self, requests, disable_tqdm=False):
        """For requests with args (question, continuation): [(log likelihood in nats, greedy)].

        greedy: would greedy decoding write the same tokens? All continuations of a question share
        one recursion. The blank that the harness puts before a continuation is left out, because a
        chat's answer begins without one."""
        asked, found = defaultdict(dict), {}          # {question: {continuation: its text}}, ..
        for question, continuation in (request.args for request in requests):
            asked[question][continuation] = continuation.removeprefix(" ")
        for batch in self.batches(list(asked), "continuations"):
            run = recurse(self.mas, self.mas.request(batch, **self.asked), writing=self.writing)
            agent, context = run.last_turn.agent, run.last_turn.read()
            pairs = [(b, one) for b, question in enumerate(batch) for one in asked[question]]
            tokens = agent.tokenize([asked[batch[b]][one] for b, one in pairs])
            # Greedy decoding runs once per question, whatever the number of its continuations.
            greedy = agent.write(context, max(map(len, tokens)))                # B lists of ids
            for few in chunks(range(len(pairs)), self.batch_size):
                losses = agent.answer_loss(context.pick([pairs[i][0] for i in few]),
                                           [tokens[i] for i in few])            # tensors (T,)
                for i, loss in zip(few, losses):
                    b, one = pairs[i]
                    found[batch[b], one] = (-loss.sum().item(),
                                            greedy[b][:len(tokens[i])] == tokens[i])
        return [found[request.args] for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Refused."""
        need(False, "a task of perplexity (loglikelihood_rolling) asks no question: leave it out")

    def chat_template(self, chat_template=False):
        """Refused. The harness calls this for --apply_chat_template alone."""
        need(False, "leave --apply_chat_template out: each role's prompt is put into the chat of "
             "its own model")


def main():
    """`lm_eval run` with this model."""
    # Some benchmarks import the library `evaluate`. Our script of that name must not be found in
    # its place, and our own modules are loaded by now.
    project = Path(__file__).resolve().parent.parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != project]
    # The harness's own default is cuda:0. What the user gives stands later, and so counts.
    sys.argv[1:1] = ["run", "--model", NAME, "--device", "auto"]
    cli_evaluate()


if __name__ == "__main__":
    flags.run(main)
