"""The layer files of a pipeline that is written for other stages, as trees.

    layer_03-model_states.pt            a layer in 16 bits, as the source has it
    layer_03-model_01-model_states.pt   its shards of tensor-parallel rank 1

An engine takes as many files of a layer as it has tensor-parallel ranks, in the order of
their names. Source: DeepSpeed 0.19.8 ``runtime/pipe/module.py`` (``ckpt_layer_path_list``,
``load_state_dir``), ``runtime/state_dict_factory.py`` (``load``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.torch_files import object_graph
from converters.zero.merging.checkpoint import MergedCheckpoint, tensor_node
from converters.zero.pipeline.stages import PipelineCheckpoint


def trees(source: PipelineCheckpoint) -> Iterator[tuple[str, Any]]:
    """The layer files by name, those of a tied module with the copy that is the model's."""
    for layer, content_layer in _content_layers(source).items():
        content = source.layers[content_layer]
        yield source.layers[layer].path.name, object_graph.read(content.path).root


def trees_of_shards(
    source: PipelineCheckpoint, shards: MergedCheckpoint, tensor_rank: int | None
) -> Iterator[tuple[str, Any]]:
    """The layer files of a tensor-parallel rank by name; ``None`` where there is one alone.

    ``shards`` is what the rank has of the whole model, ``source`` the pipeline of any rank.
    """
    prefixes = {home.layer: home.prefix for home in source.homes}
    infix = "" if tensor_rank is None else f"model_{tensor_rank:02d}-"
    for layer, content_layer in _content_layers(source).items():
        root = object_graph.read(source.layers[content_layer].path).root
        prefix = prefixes.get(content_layer, str(content_layer))
        tree = object_graph.replaced(root, dict(_nodes(shards, root, prefix)))
        yield f"layer_{layer:02d}-{infix}model_states.pt", tree


def _content_layers(source: PipelineCheckpoint) -> dict[int, int]:
    """Whose file has what each layer's file is to have."""
    homes = {layer: home.layer for home in source.homes for layer in home.further_layers}
    return {layer: homes.get(layer, layer) for layer in source.layers}


def _nodes(shards: MergedCheckpoint, root: Any, prefix: str) -> Iterator[tuple[Any, Any]]:
    """The parameters of a layer file as the rank has them; those that are tied share one."""
    weights = shards.weights
    shared_nodes: dict[str, Any] = {}
    for key, _ in object_graph.pairs(root):
        name = f"{prefix}.{key}"
        owner = weights.aliases.get(name, name)
        tensor = weights.copies.get(owner, weights.tensors.get(owner))
        if tensor is None or owner in weights.buffers:
            continue
        if owner not in shared_nodes:
            shared_nodes[owner] = tensor_node(tensor)
        yield key, shared_nodes[owner]
