"""What a model's chat template and tokenizer do with a text.

A chat template is a small program of the model's maker, in the language jinja. It puts signs around
the words of a user and of a model. Three things in it need care. Some templates refuse a system
text, or leave it out. Some write the date of the day into the prompt, and then tomorrow's results
would be others: here it is always the same day. And the template knows where a turn of the model
ends: the configuration of a base model often names another token.
"""
import contextlib
import copy
import datetime
import re

import jinja2

from support.errors import need

MARK = "\ue000{}\ue001"         # stands for a {name} of a prompt: signs of Unicode's private range
DAY = datetime.date(2024, 7, 26)          # the date in Llama 3's own template


def as_role(agent, role):
    """The agent as a role uses it, in a chat or without one. Two roles may share a frozen model.

    Raises ValueError if the role needs a chat template and the model has none."""
    need(agent.tokenizer.chat_template or not role.chat, f"{agent.name} has no chat template: take "
         f"the instruct model, put a chat_template.jinja beside it, or give role {role.name} "
         "chat=False, if its prompts are whole texts")
    agent = copy.copy(agent)
    agent.chat = role.chat
    return agent


def write_chat(tokenizer, messages, thinking=False, ask=True):
    """The chat of messages (role, content) as one text. ask: it ends where the model has to go on.

    Raises jinja2.TemplateError if the template refuses a role, ValueError if it writes a flood."""
    # strftime_now("%d %B") in a template is the library's clock. Here it is "26 July".
    template = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
                      lambda found: repr(DAY.strftime(found[2])), tokenizer.get_chat_template())
    chat = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], chat_template=template,
        tokenize=False, add_generation_prompt=ask, enable_thinking=thinking,
        date_string=f"{DAY:%d %b %Y}")
    need(len(chat) < 100_000 + 4 * sum(len(content) for _, content in messages),
         f"the chat template of {tokenizer.name_or_path or 'this model'} writes {len(chat)} signs")
    return chat


def render(tokenizer, system, user, thinking=False):
    """The chat around a user's text as one text, up to where the model has to go on.

    A template without a system role gets the system text at the head of the user's turn."""
    text, system = "", system.strip()          # many templates strip the system text
    with contextlib.suppress(jinja2.TemplateError):        # this template refuses a system role ..
        text = system and write_chat(tokenizer, [("system", system), ("user", user)], thinking)
    if not text or system not in text:                     # .. or leaves the system text out
        text = write_chat(tokenizer, [("user", f"{system}\n\n{user}".strip())], thinking)
    marks = MARK.format("(.*?)")
    need(re.findall(marks, text) == re.findall(marks, user), "the chat template of "
         f"{tokenizer.name_or_path or 'this model'} leaves out what the user says: take one that "
         "writes message['content']")
    return text


def whole_text(tokenizer, user):
    """A user's text as all that the model reads, without a chat. The token that the tokenizer puts
    before every text (Gemma's is `<bos>`) stands before it."""
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token + user if begins else user


def turn_ends(tokenizer):
    """Ids of the special token that the template puts after what an assistant says: one or none."""
    if not tokenizer.chat_template:
        return set()
    chat = said = MARK.format("")            # if the template refuses, nothing comes after it
    with contextlib.suppress(jinja2.TemplateError):
        chat = write_chat(tokenizer, [("user", "?"), ("assistant", said)], ask=False)
    after = tokenizer(chat.rpartition(said)[2].strip(), add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    return {token for token in after[:1] if token in added and added[token].special}
