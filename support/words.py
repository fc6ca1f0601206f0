"""Words that a tokenizer does not know. A model reads one and the same token for all of them, so it
cannot tell one question from another. The answers look fine, and nothing else would say so.
"""
from support.errors import say_once, shown


def tell_unknown(tokenizer, texts):
    """Print the words of each of these texts that the tokenizer does not know. The same line is
    printed once."""
    unknown, name = tokenizer.unk_token, tokenizer.name_or_path or "this model"
    for text in texts:
        words = [word for word in dict.fromkeys(text.split()) if unknown not in word
                 and tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]
        if words:
            say_once(shown(f"{name} reads {unknown} for the words {', '.join(words)}"))
