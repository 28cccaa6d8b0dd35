"""The names and shapes of a Llama of any size."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

Shapes = dict[str, torch.Size]
Tree = dict[str, Any]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama_config(weights: int, tied: bool) -> Tree:
    """The Llama config whose number of weights comes close, about 96 times as wide as deep."""

    def config(hidden: int, layers: int) -> Tree:
        return {
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": hidden,
            "intermediate_size": -(-hidden * 8 // (3 * 128)) * 128,
            "num_attention_heads": hidden // 64,
            "num_hidden_layers": layers,
            "tie_word_embeddings": tied,
            "vocab_size": 32000,
        }

    def filled(hidden: int) -> Tree:
        outside, one = (count(llama(config(hidden, layers))) for layers in (0, 1))
        return config(hidden, max(1, round((weights - outside) / (one - outside))))

    filled_configs = map(filled, range(128, 16385, 128))
    return min(filled_configs, key=lambda c: abs(c["hidden_size"] / c["num_hidden_layers"] - 96))


def llama(config: Tree) -> Shapes:
    """The model's names and shapes, in its own order, less a tied lm_head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = shapes[EMBEDDING]
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def count(shapes: Shapes) -> int:
    """The number of elements of all shapes together."""
    return sum(map(prod, shapes.values()))
