"""Adapters of many kinds for a tiny model, for tests that train them or only make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from heavy_libraries import peft, transformers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _lora(**more: Any) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**options | {"init_lora_weights": False} | more)


KINDS = {
    "lora": _lora,
    "rslora": lambda: _lora(use_rslora=True, alpha_pattern={"down_proj": 3}),
    "dora": lambda: _lora(use_dora=True),
    "saved": lambda: _lora(modules_to_save=["lm_head"], bias="lora_only"),
    "tokens": lambda: _lora(trainable_token_indices={"embed_tokens": [3, 5, 60]}),
    "embedding": lambda: _lora(target_modules=["embed_tokens", "q_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def base_model(folder: Path | None) -> Any:
    """The base model in fp32: new, and always the same, or read from a folder."""
    if folder is not None:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)
