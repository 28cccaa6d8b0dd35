"""A pipeline whose layers are cut for tensor-parallel ranks as Megatron cuts them, and the same
model without stages.

The whole model has the same first weights whatever it is cut for: each layer is made whole from its
seed, and a rank keeps its shards.
"""

from __future__ import annotations

from typing import Any

import torch
from parallel_experts import Copied, ModelRanks, Summed
from torch import distributed, nn

WORDS, HIDDEN, INNER = 32, 16, 24
INFO = {  # universal_checkpoint_info, as Megatron-DeepSpeed writes it
    "universal_checkpoint_version": 0.2,
    "tp_replicated_parameter_patterns": [r".*norm\.(weight|bias)", r".*down\.bias", r"4\..*"],
    "parameter_with_row_parallelism_patterns": [r".*down\.weight"],
    "vocabulary_parameter_patterns": [r".*words\.weight"],
    "original_vocab_size": WORDS,
}


class _Gathered(torch.autograd.Function):
    """What each rank has of the last axis, one after another."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, ranks: ModelRanks) -> torch.Tensor:
        context.ranks = ranks
        shards = [torch.empty_like(x) for _ in range(ranks.tensor_ranks)]
        distributed.all_gather(shards, x.contiguous(), group=ranks.get_model_parallel_group())
        return torch.cat(shards, -1)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = context.ranks
        own = gradient.chunk(ranks.tensor_ranks, -1)[ranks.get_model_parallel_rank()]
        return own.contiguous(), None


def _shard(tensor: torch.Tensor, axis: int, ranks: ModelRanks) -> nn.Parameter:
    own = tensor.chunk(ranks.tensor_ranks, axis)[ranks.get_model_parallel_rank()]
    parameter = nn.Parameter(own.detach().clone())
    parameter.model_parallel = True
    return parameter


class Words(nn.Module):
    """A tied module, the embedding and the head, with the rows of its words cut."""

    def __init__(self, ranks: ModelRanks) -> None:
        super().__init__()
        self.ranks = ranks
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.words.weight = _shard(self.words.weight, 0, ranks)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.words.weight.shape[0]
        own_ids = ids - rows * self.ranks.get_model_parallel_rank()
        is_own = (own_ids >= 0) & (own_ids < rows)
        is_own = is_own.to(self.words.weight.dtype)
        vectors = nn.functional.embedding(own_ids.clamp(0, rows - 1), self.words.weight)
        partial = vectors * is_own.unsqueeze(-1)
        out: torch.Tensor = Summed.apply(partial, self.ranks.get_model_parallel_group())
        return out


class Layer(nn.Module):
    """A layer with a buffer, whose inner width is cut."""

    def __init__(self, ranks: ModelRanks) -> None:
        super().__init__()
        self.ranks = ranks
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.up.weight = _shard(self.up.weight, 0, ranks)
        self.up.bias = _shard(self.up.bias, 0, ranks)
        self.down.weight = _shard(self.down.weight, 1, ranks)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.ranks.get_model_parallel_group()
        inner = torch.tanh(self.up(Copied.apply(self.norm(x), group)))
        summed = Summed.apply(nn.functional.linear(inner, self.down.weight), group)
        out: torch.Tensor = x + (summed + self.down.bias) * self.scale
        return out.to(x.dtype)


def head(module: Words, x: torch.Tensor) -> torch.Tensor:
    x = Copied.apply(x, module.ranks.get_model_parallel_group())
    logits: torch.Tensor = _Gathered.apply(
        nn.functional.linear(x, module.words.weight), module.ranks
    )
    return logits


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def pipeline(stages: int, tensor_ranks: int) -> nn.Module:
    """The model on so many stages of so many tensor-parallel ranks."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    ranks = ModelRanks(tensor_ranks)
    replicas = distributed.get_world_size() // (stages * tensor_ranks)
    layers = [
        TiedLayerSpec("embed", Words, ranks, tied_weight_attr="words.weight"),
        *(LayerSpec(Layer, ranks) for _ in range(3)),
        LayerSpec(nn.LayerNorm, HIDDEN),
        TiedLayerSpec("embed", Words, ranks, forward_fn=head, tied_weight_attr="words.weight"),
    ]
    model: nn.Module = PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor_ranks, num_dp=replicas),
        loss_fn=loss_of,
        partition_method="uniform",
        seed_layers=True,
    )
    return model


class Unsplit(nn.Module):
    """The pipeline's model as a plain module, its parameters under the same names."""

    def __init__(self, ranks: ModelRanks) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": Words(ranks)})
        for number in (1, 2, 3):
            self.add_module(str(number), Layer(ranks))
        self.add_module("4", nn.LayerNorm(HIDDEN))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tied_modules["embed"](ids)
        for number in (1, 2, 3, 4):
            x = getattr(self, str(number))(x)
        return loss_of(head(self.tied_modules["embed"], x), ids)
