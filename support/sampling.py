"""How the next word is chosen from a model's logits: the likeliest word, or a draw.

    p = softmax(logits / temperature)        then top_p, top_k or min_p set unlikely words to 0

Each row of a batch brings its own random number u, so what a row draws does not depend on the rows
beside it. The library's own sampling draws for the whole batch at once, and depends on it.
"""
import math
from dataclasses import dataclass

import torch
import transformers

from support.errors import need


@dataclass
class Sampling:
    """temperature 0 takes the likeliest word. Above 0 a word is drawn, and top_p, top_k and min_p
    cut unlikely words off. repetition_penalty makes words less likely that were written before."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        need(0 <= self.temperature < math.inf and self.repetition_penalty > 0, "temperature is at "
             f"least 0 and repetition_penalty above 0, not {self.temperature} and "
             f"{self.repetition_penalty}")                              # (and a NaN is neither)
        need(0 <= self.top_p <= 1 and 0 <= self.min_p <= 1 and self.top_k >= 0, "top_p and min_p "
             f"are between 0 and 1 and top_k is at least 0, not {self.top_p}, {self.min_p} and "
             f"{self.top_k}")

    def choose(self, logits, so_far, u):
        """The next tokens (B,) from logits (B, V). so_far: B equally long lists of the tokens
        written before. u (B,), drawn from U(0, 1), decides where a word is drawn."""
        if self.repetition_penalty != 1.0:               # only this one looks back
            so_far = torch.tensor(so_far, dtype=torch.long, device=logits.device)
        logits = self.warpers()(so_far, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # Inverse transform sampling: the first word whose cumulated probability exceeds u.
        cumulated = logits.softmax(-1).cumsum(-1)                                   # (B, V)
        u = u[:, None] * cumulated[:, -1:]               # the last sum is 1 only up to rounding
        return torch.searchsorted(cumulated, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    def warpers(self):
        """The library's functions (tokens so far, logits) -> logits, in the library's order."""
        chosen = transformers.LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(transformers.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            chosen.append(transformers.TemperatureLogitsWarper(self.temperature))
            if self.top_k > 0:
                chosen.append(transformers.TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                chosen.append(transformers.TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                chosen.append(transformers.MinPLogitsWarper(self.min_p))
        return chosen
