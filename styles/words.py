"""The words that the prompts of the real styles share, and the published settings."""
from styles import KINDS

TASK = {
    "math": "Problem:\n{question}",
    "choice": "Multiple-choice question:\n{question}",
    "code": "Programming task:\n{question}",
    "search": "Question:\n{question}",
}
SOLVE = {
    "math": "Solve the problem step by step. {answer_format}",
    "choice": "Weigh the options one by one, then choose. {answer_format}",
    "code": "Write the program. {answer_format}",
    "search": "Put the facts together, then answer. {answer_format}",
}


def per_kind(*parts):
    """{kind: prompt}. Each prompt is put together from parts that are a text or {kind: text}."""
    return {kind: "\n\n".join(part if isinstance(part, str) else part[kind] for part in parts)
            for kind in KINDS}


def benchmark_settings(batch_size, latent_length, math500_tokens=2000):
    """Style.settings for evaluate.py: the published decoding budgets. latent_length: {data set: m}.

    Without flags evaluate.py asks the latent system alone, in three rounds, as the publishers'
    command does."""
    tokens = {"math500": math500_tokens, "aime25": 16000, "aime26": 16000, "gpqa": 4000,
              "medqa": 4000, "mbppplus": 4000, "livecodebench": 4000}
    settings = {name: {"max_new_tokens": count} for name, count in tokens.items()}
    for name in ("mbppplus", "livecodebench"):
        settings[name]["temperature"] = 0.2
    for name, m in latent_length.items():
        settings[name]["latent_length"] = m
    evaluate = {"batch_size": batch_size, "method": ["latent"], "num_recursive_rounds": [3]}
    return {"evaluate": evaluate, **settings}
