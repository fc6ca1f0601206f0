"""Words that a tokenizer does not know. A model reads one and the same token for all of them, so it
cannot tell one question from another. The answers look fine, and nothing else would say so.
"""
from collections import defaultdict

from support.errors import shown

TOLD = defaultdict(set)        # {tokenizer's name: the words that were named by now}


def tell_unknown(tokenizer, texts):
    """Print the words of these texts that the tokenizer does not know, in one line for all the
    texts. A word is named once, else a thousand questions would fill many screens."""
    unknown, name = tokenizer.unk_token, tokenizer.name_or_path or "this model"
    new = [word for word in dict.fromkeys(" ".join(texts).split())
           if word not in TOLD[name] and unknown not in word
           and tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]
    TOLD[name].update(new)
    if new:
        print(shown(f"{name} reads {unknown} for unknown words: {', '.join(new)}"), flush=True)
