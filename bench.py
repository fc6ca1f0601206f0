"""What a system costs, worked out and measured.

    python bench.py                    # memory of every style, from the models' dimensions

Memory: a model and its cache are made on torch's meta device, where tensors have a shape and no
numbers, so that the bytes are those of the real code and nothing is downloaded.
"""
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import common
from agents import DTYPES, new_cache
from link import InnerLink, OuterLink
from styles import all_styles

# The base models, as their config.json describes them.
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
              num_attention_heads=16, image_size=896, patch_size=14)


def dims(model_type, width, inner_width, layers, heads, kv_heads, words, tied=True, **others):
    """A text model's config."""
    return CONFIG_MAPPING[model_type](
        hidden_size=width, intermediate_size=inner_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
        tie_word_embeddings=tied, **others)


def real_dims():
    """{base model: its config}. Those of Qwen3.5-2B and -4B are recalled, not read from the hub;
    the number of parameters that follows agrees with the models' names."""
    small = dict(linear_num_key_heads=16, linear_num_value_heads=16)
    large = dict(linear_num_key_heads=16, linear_num_value_heads=32)
    gemma = dims("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256)
    return {
        "Qwen/Qwen3-1.7B": dims("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128),
        "meta-llama/Llama-3.2-1B-Instruct": dims("llama", 2048, 8192, 16, 32, 8, 128256),
        "Qwen/Qwen2.5-Math-1.5B-Instruct": dims("qwen2", 1536, 8960, 28, 12, 2, 151936),
        "google/gemma-3-4b-it": CONFIG_MAPPING["gemma3"](text_config=gemma.to_dict(),
                                                         vision_config=SIGLIP),
        "meta-llama/Llama-3.2-3B-Instruct": dims("llama", 3072, 8192, 28, 24, 8, 128256),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B":
            dims("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=False),
        "Qwen/Qwen2.5-Coder-3B-Instruct": dims("qwen2", 2048, 11008, 36, 16, 2, 151936),
        "BioMistral/BioMistral-7B": dims("mistral", 4096, 14336, 32, 32, 8, 32000, tied=False),
        "Qwen/Qwen3.5-2B": dims("qwen3_5_text", 2048, 6144, 24, 8, 2, 248320, **small),
        "Qwen/Qwen3.5-4B": dims("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320, **large),
        "Qwen/Qwen3.5-9B": dims("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, False, **large)}


# ---- memory -------------------------------------------------------------------------------------

def size_of(tensors):
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_memory(config, dtype, batch_size, tokens):
    """(bytes of the weights, bytes of a cache of batch_size rows of `tokens` positions, width)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        body = model.get_decoder()
        width, cache = body.config.hidden_size, new_cache(body.config)
        embeds = torch.empty(batch_size, tokens, width, dtype=dtype)
        body(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    held = []
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            held += [one for one in values if torch.is_tensor(one)]
    return size_of([*model.parameters(), *model.buffers()]), size_of(held), width


def style_memory(style, configs, dtype, batch_size, tokens):
    """Bytes that a style takes: {"weights", "links", "cache"}.

    configs: {base model: config}; a base model that two roles share counts once. Links are
    float32. cache: of all agents together, batch_size rows of `tokens` positions in each."""
    models = {role.model: model_memory(configs[role.model], dtype, batch_size, tokens)
              for role in style.roles}
    by_role = {role.name: models[role.model] for role in style.roles}
    with torch.device("meta"):
        links = [InnerLink(width) for _, _, width in by_role.values()]
        links += [OuterLink(by_role[edge.src][2], by_role[edge.dst][2]) for edge in style.edges]
    return {"weights": sum(weights for weights, _, _ in models.values()),
            "links": size_of([weight for link in links for weight in link.parameters()]),
            "cache": sum(cache for _, cache, _ in by_role.values())}


def memory_table(tokens=1000):
    """Print what each real style takes, by dtype."""
    configs = real_dims()
    print(f"GB of weights and links, and of a cache of {tokens} positions of one question in all "
          "agents")
    print(f"{'style':18s} {'dtype':9s} {'weights':>8s} {'links':>6s} {'cache':>6s}")
    for style in all_styles().values():
        if not all(role.model in configs for role in style.roles):
            continue
        for dtype in ("bfloat16", "float32"):
            size = style_memory(style, configs, DTYPES[dtype], 1, tokens)
            print(f"{style.name:18s} {dtype:9s} {size['weights'] / 1e9:8.2f} "
                  f"{size['links'] / 1e9:6.2f} {size['cache'] / 1e9:6.3f}")


def main():
    common.Parser(__doc__.split("\n")[0]).parse_args()
    memory_table()


if __name__ == "__main__":
    common.run(main)
