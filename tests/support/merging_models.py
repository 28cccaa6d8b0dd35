"""Tiny live PEFT models, and what a checkpoint holds of them: frozen weights in 16 bits, trained
ones in fp32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from heavy_libraries import peft, transformers
from safetensors.torch import save_file

from converters.formats import safetensors
from converters.peft import config as configs
from converters.peft.config import AdapterConfig
from converters.tensors import Weights

HIDDEN, VOCAB = 24, 40


def llama(**changes: Any) -> torch.nn.Module:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes))


def gpt2(tied: bool = False) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tied,
    )
    return transformers.GPT2LMHeadModel(config)


class Convolutions(torch.nn.Module):
    """Convolutions of one, two and three axes, and what they lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv1d(4, 6, 3)
        self.two = torch.nn.Conv2d(6, 8, 3)
        self.point = torch.nn.Conv2d(8, 5, 1)
        self.three = torch.nn.Conv3d(5, 4, 2)
        self.last = torch.nn.Linear(7, 3)


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every trained parameter other values, as a training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.2 * noise)


@dataclass
class Checkpoint:
    """What was trained: the weights as they are saved, the adapters' configurations, the base."""

    weights: Weights
    configs: dict[str, AdapterConfig]
    base: torch.nn.Module
    model: Any
    frozen: torch.dtype


def checkpoint(
    base: torch.nn.Module,
    adapters: dict[str, Any],
    folder: Path,
    frozen: torch.dtype = torch.bfloat16,
) -> Checkpoint:
    """A trained PEFT model, and its state in a file as a ZeRO checkpoint holds it."""
    base = base.to(frozen).float()  # the trainer's base has no more than its copy
    clean = copy.deepcopy(base)
    (first, config), *others = adapters.items()
    model = peft.get_peft_model(base, config, adapter_name=first)
    for name, other in others:
        model.add_adapter(name, other)
    if others:
        model.base_model.set_adapter(list(adapters))
    perturb(model)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if not value.requires_grad and value.is_floating_point():
                value.copy_(value.to(frozen))

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    state: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        owner = owners.setdefault(id(value), name)
        if owner != name:
            aliases[name] = owner
            continue
        floating = value.is_floating_point() and name not in trained
        state[name] = value.detach().to(frozen if floating else value.dtype).contiguous().clone()
    save_file(state, folder / "state.safetensors")

    refs = safetensors.read(folder / "state.safetensors").tensors
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = Weights(
        refs,
        aliases,
        frozen=frozenset(name for name in refs if name in parameters - trained),
        buffers=frozenset(name for name in refs if name not in parameters),
        order=(*state, *aliases),
    )
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    found = {}
    for name in adapters:
        place = folder / "adapter" / name
        found[name] = configs.read(place if place.is_dir() else folder / "adapter")
    return Checkpoint(weights, found, clean, model, frozen)


def merge_and_unload(made: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What PEFT makes of the same adapters and of the base loaded in a type."""
    base = copy.deepcopy(made.base).to(dtype)
    (first, config), *others = made.model.peft_config.items()
    model = peft.get_peft_model(base, copy.deepcopy(config), adapter_name=first)
    for name, other in others:
        model.add_adapter(name, copy.deepcopy(other))
    shared = dict(made.model.named_buffers())
    for name, buffer in model.named_buffers():
        if "vera_" in name:
            buffer.copy_(shared[name])
    for name in made.configs:
        values = peft.get_peft_model_state_dict(made.model, adapter_name=name)
        peft.set_peft_model_state_dict(model, values, adapter_name=name)
    trained = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained and not parameter.requires_grad:
                parameter.copy_(trained[name])
    if others:
        model.base_model.set_adapter(list(made.configs))
    merged = model.merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}
