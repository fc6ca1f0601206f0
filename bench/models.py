"""Random models of real dimensions, and what the real styles take in memory.

The bench measures with them. Nothing is downloaded: times and bytes depend on a model's config
alone, and not on its weights. A model is chosen by the name of its base model, or by one of DIMS.
"""
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from agents import Agent
from cache import new_cache
from link import InnerLink, OuterLink
from styles import all_styles, get_style
from support.devices import DTYPES

DIMS = {"qwen3-0.6b": ["Qwen/Qwen3-0.6B"] * 3, "qwen3-1.7b": ["Qwen/Qwen3-1.7B"] * 3,
        "light": [role.model for role in get_style("sequential_light").roles],
        "tiny": ["tiny"] * 3}                      # the base models of planner, critic and solver


def dims(kind, width, inner_width, layers, heads, kv_heads, words, tied=True, **others):
    """A language model's config. The names of `others` are the library's, and fields that are not
    given have the library's default.

    words: of the vocabulary. tied: the vocabulary head is the embedding, and takes no memory."""
    return CONFIG_MAPPING[kind](
        hidden_size=width, intermediate_size=inner_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
        tie_word_embeddings=tied, **others)


def real_dims():
    """{base model: its config}, and a tiny one for tests. The numbers are those of the real models'
    config.json, with two exceptions.

    The dimensions of Qwen3.5-2B and -4B are recalled, not read from the hub. The number of
    parameters that follows from them agrees with the models' names. Gemma has a vision model
    (siglip), which takes memory although nothing here looks at pictures."""
    gemma = dims("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256).to_dict()
    siglip = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                  num_attention_heads=16, image_size=896, patch_size=14)
    deepseek = dims("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=False)
    qwen_2b = dims("qwen3_5_text", 2048, 6144, 24, 8, 2, 248320, linear_num_value_heads=16)
    return {
        "tiny": dims("qwen3", 64, 128, 2, 4, 2, 256, head_dim=16),
        "Qwen/Qwen3-0.6B": dims("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128),
        "Qwen/Qwen3-1.7B": dims("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128),
        "meta-llama/Llama-3.2-1B-Instruct": dims("llama", 2048, 8192, 16, 32, 8, 128256),
        "meta-llama/Llama-3.2-3B-Instruct": dims("llama", 3072, 8192, 28, 24, 8, 128256),
        "Qwen/Qwen2.5-Math-1.5B-Instruct": dims("qwen2", 1536, 8960, 28, 12, 2, 151936),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": deepseek,
        "Qwen/Qwen2.5-Coder-3B-Instruct": dims("qwen2", 2048, 11008, 36, 16, 2, 151936),
        "BioMistral/BioMistral-7B": dims("mistral", 4096, 14336, 32, 32, 8, 32000, tied=False),
        "google/gemma-3-4b-it": CONFIG_MAPPING["gemma3"](text_config=gemma, vision_config=siglip),
        "Qwen/Qwen3.5-2B": qwen_2b,
        "Qwen/Qwen3.5-4B": dims("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320),
        "Qwen/Qwen3.5-9B": dims("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, tied=False)}


def words_tokenizer(count):
    """Token i is the word "wi". So a text of n words has n tokens, whichever model wrote it.

    A real tokenizer joins and splits words, and a text that is read again would be longer or
    shorter than the text that was written."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = "w1 {% for turn in messages %}{{ turn['content'] }} {% endfor %}w2"
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", chat_template=chat)


def new_agent(base, layers, device, dtype, spread=0.3):
    """An agent with random weights. It never ends a text, so texts have the length asked for.

    layers: 0 for as many as the base model has. spread: the weights' standard deviation, times the
    root of the width. With the library's usual deviation of .02 the spread is .9 at width 2048, and
    such a model is chaotic under its own rollout: a push of 1e-3 on the prompt grows to .8 within
    12 steps through 28 layers, and to .16 through 4. Then no two results can be compared. With a
    spread of .45 the push stays at 2e-3, and we take .3."""
    config = real_dims()[base]
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.initializer_range = spread / config.hidden_size ** 0.5
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None        # some families have one by default
    agent = Agent(model, words_tokenizer(config.vocab_size))
    # reference.py knows neither devices nor autocast. So the embedding moves the tokens that it is
    # given, and links have the model's dtype here. (Everywhere else they are float32.)
    agent.embedding.register_forward_pre_hook(lambda _, tokens: tokens[0].to(device))
    link = InnerLink(agent.width, gain=agent.embedding_rms)
    agent.inner = link.to(device, dtype).requires_grad_(False)
    return agent


def some_texts(tokens, count, seed=0):
    """`count` random texts of `tokens` tokens. They are the same in every run."""
    numbers = torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{number}" for number in text) for text in numbers.tolist()]


# ---- memory -------------------------------------------------------------------------------------

def size_of(tensors):
    """Bytes of tensors. On the meta device too, where they are not really there."""
    return sum(tensor.nbytes for tensor in tensors)


def model_memory(config, dtype, B, T):
    """(bytes of the weights, bytes of a cache of B questions of T positions, width) of a model.

    On torch's meta device, tensors have a shape and no numbers. So these are the bytes of the real
    code, and they take no memory here."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        agent, cache = Agent(model, words_tokenizer(1)), new_cache(model.get_decoder().config)
        # The body, and not agent.read(): without numbers the library cannot look at a mask.
        agent.body(inputs_embeds=torch.empty(B, T, agent.width, dtype=dtype), use_cache=True,
                   **{agent.cache_name: cache})
    # A layer of the cache has its keys and values as tensors, or recurrent states in dicts.
    held = [value for layer in cache.layers for value in vars(layer).values()]
    held += [state for value in held if isinstance(value, dict) for state in value.values()]
    weights = size_of([*model.parameters(), *model.buffers()])
    return weights, size_of(filter(torch.is_tensor, held)), agent.width


def style_memory(style, configs, dtype, B, T):
    """Bytes that a style takes: {"weights", "largest", "links", "cache"}.

    configs: {base model: config}. A base model that two roles share counts once. largest: of one
    agent, which is what --offload keeps on the card. Links are float32. cache: of all agents."""
    taken = {role.model: model_memory(configs[role.model], dtype, B, T) for role in style.roles}
    roles = {role.name: taken[role.model] for role in style.roles}   # (weights, cache, width)
    with torch.device("meta"):
        links = [InnerLink(width) for _, _, width in roles.values()]
        links += [OuterLink(roles[edge.src][2], roles[edge.dst][2]) for edge in style.edges]
    weights = [size for size, _, _ in taken.values()]
    return {"weights": sum(weights), "largest": max(weights),
            "links": sum(size_of(link.parameters()) for link in links),
            "cache": sum(cache for _, cache, _ in roles.values())}


def memory_table(styles=None, tokens=1000):
    """Print what styles take, by dtype, and return the lines in bytes. By default these are all
    styles whose models have real dimensions.

    A released repo has the whole model beside its link, so two roles with the same base model may
    well be loaded as two copies. The table counts such a base model once."""
    configs, lines = real_dims(), []
    print(f"  GB, with a cache of {tokens} positions of one question in all agents. (Dimensions of "
          "Qwen3.5-2B and -4B are recalled.)\n"
          f"  {'style':18s} {'dtype':9s} weights  largest  links   cache")
    for style in map(get_style, styles or all_styles()):
        known = all(role.model in configs for role in style.roles)
        for dtype in ("bfloat16", "float32") if known else ():
            size = style_memory(style, configs, DTYPES[dtype], 1, tokens)
            lines.append({"case": style.name, "dtype": dtype, **size})
            print("  {:18s} {:9s} {:7.2f} {:8.2f} {:6.2f} {:7.3f}".format(
                style.name, dtype, *(held / 1e9 for held in size.values())), flush=True)
    return lines
