"""The contents of a checkpoint, as trees that can be written again.

A checkpoint of ZeRO alone has it in its files. One of more parallelism is merged first:
its parameters, their states and its state dict are those of the whole model then, and
everything else is what the files of the first model-parallel rank have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.pickles.values import Call
from converters.source import Source, SourceTopology
from converters.tensors import TensorRef, Weights
from converters.torch_files import object_graph
from converters.zero import param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import discovery
from converters.zero.files.state_files import MAX_NESTING, State
from converters.zero.merging import roots
from converters.zero.parallel.cuts import Cut
from converters.zero.param_groups import ParamGroup

Node = Any  # a value in a tree (``object_graph``)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MergedCheckpoint(Checkpoint):
    """A checkpoint of more parallelism, as if ZeRO alone had saved it.

    ``source`` is what was merged, ``groups`` are the whole param groups. ``model`` and
    ``ranks`` are the files of the first model-parallel rank, ``model_paths`` its model
    files by data rank. ``layer_nodes`` are values of the state dict that lie in other
    files, ``changes`` entries of model files that the whole model has otherwise,
    ``universal_entries`` what the files of the universal format say of a parameter.
    ``cuts`` are how its parameters were cut for ``tensor_ranks`` of them.
    ``optimizer_entries`` are the root of an optimizer file, where there are none.
    """

    source: Source
    groups: tuple[ParamGroup, ...]
    model_paths: tuple[Path, ...]
    layer_nodes: Mapping[str, Node] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    universal_entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    tensor_ranks: int = 1
    optimizer_entries: Mapping[Any, Any] | None = None

    def model_root(self, root: Mapping[Any, Any]) -> Any:
        """The root of a model file with the state dict of the whole model."""
        own_nodes = dict(self.layer_nodes)
        if root.get("module") is not None:
            own_nodes |= _flattened(root["module"])

        trained = {name for group in self.groups for name in group.shapes}
        shared_nodes: dict[str, Node] = {}
        nodes = {}
        for name in self.weights.order:
            owner = self.weights.aliases.get(name, name)
            tensor = self.weights.tensors.get(owner)
            is_own = tensor is None or owner in self.weights.buffers or self.stage == 3
            if name in own_nodes and (is_own or owner in trained):
                nodes[name] = own_nodes[name]
            elif tensor is not None:
                copy = self.weights.copies.get(owner, tensor)
                nodes[name] = shared_nodes.setdefault(owner, tensor_node(copy))

        # what torch keeps beside a state dict (_metadata) is that of the first rank
        old_module = root.get("module")
        state = old_module.state if isinstance(old_module, Call) else None
        module = Call(object_graph.ORDERED, (), state, pairs=list(nodes.items()))
        entries = {"module": module, "dp_world_size": self.world_size}
        return {**roots.of_zero_alone(root), **self.changes, **entries}

    def tensors(self) -> Iterator[tuple[str, TensorRef]]:
        """Every tensor that is written, with a label; some have replicas on other ranks."""
        for group in self.groups:
            for key, tensors_by_name in group.values.items():
                for name, tensor in tensors_by_name.items():
                    yield f"{key} of {name}" if key else name, tensor

        trained = {name for group in self.groups for name in group.shapes}
        untrained = {
            name: tensor for name, tensor in self.weights.tensors.items() if name not in trained
        }
        yield from untrained.items()
        yield from ((f"16-bit {name}", copy) for name, copy in self.weights.copies.items())


def original(checkpoint: Source) -> Source:
    """The checkpoint that was saved: this one, or what it was merged from."""
    return checkpoint.source if isinstance(checkpoint, MergedCheckpoint) else checkpoint


def whole_model(
    model: State,
    weights: Weights,
    groups: Sequence[ParamGroup],
    own_values: Mapping[str, Any],
    topology: SourceTopology,
) -> State:
    """A model file as if it had the state dict of the whole model.

    ``own_values`` are what the files have under a name: buffers, and under stage 3 what
    stands in the place of parameters.
    """
    module: dict[str, Any] = {}
    for name in weights.order:
        owner = weights.aliases.get(name, name)
        tensor = weights.copies.get(owner, weights.tensors.get(owner))
        is_own = tensor is None or topology.stage == 3 or owner in weights.buffers
        module[name] = own_values.get(name) if is_own else tensor

    entries: Mapping[str, Any] = {
        **roots.of_zero_alone(model.root),
        "module": module,
        "param_shapes": [dict(group.shapes) for group in groups],
        "dp_world_size": topology.world_size,
    }
    return State(model.file, entries)


def groups_of(checkpoint: Checkpoint) -> list[ParamGroup]:
    """The param groups of the whole model; reads the first optimizer file."""
    if isinstance(checkpoint, MergedCheckpoint):
        return list(checkpoint.groups)
    return param_groups.read(checkpoint, object_graph.read_root(checkpoint.ranks[0].path))


def universal_entries(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """The entries in files of the universal format on a parameter,
    beside its values."""
    if isinstance(checkpoint, MergedCheckpoint):
        return checkpoint.universal_entries.get(name, {})
    return {}


def optimizer_root(checkpoint: Checkpoint, rank: int) -> dict[Any, Any]:
    """The root of the optimizer file that rank ``rank``
    of any other number is made from."""
    path = checkpoint.ranks[rank % len(checkpoint.ranks)].path
    if not isinstance(checkpoint, MergedCheckpoint):
        return object_graph.read_root(path)
    root = checkpoint.optimizer_entries or object_graph.read_root(path)
    return roots.of_zero_alone(root, checkpoint.changes.get(roots.CONFIGURATION))


def optimizer_entries_of(checkpoint: Checkpoint) -> Mapping[Any, Any] | None:
    """The root of an optimizer file of a checkpoint that has no such files."""
    return checkpoint.optimizer_entries if isinstance(checkpoint, MergedCheckpoint) else None


def model_paths(checkpoint: Checkpoint, model_rank: int = 0) -> Sequence[Path]:
    """The model files: one for each rank under stage 3, else the only one.

    ``model_rank`` is the model-parallel rank that the checkpoint is of.
    """
    if isinstance(checkpoint, MergedCheckpoint):
        return checkpoint.model_paths
    if checkpoint.stage < 3:
        return [checkpoint.model.path]
    return list(discovery.lanes(checkpoint.place)[model_rank].partitioned.values())


def model_root(checkpoint: Checkpoint, path: Path) -> Any:
    """The root of one of the model files."""
    root = object_graph.read_root(path)
    return checkpoint.model_root(root) if isinstance(checkpoint, MergedCheckpoint) else root


def tensor_node(tensor: TensorRef) -> Call:
    """A tensor with a storage of its own, as a value in a tree."""
    return object_graph.tensor(object_graph.storage(tensor.view(tensor.numel)), tensor.shape)


def _flattened(module: Node, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Node]]:
    """The values of a state dict by name; Megatron nests it."""
    for key, node in object_graph.pairs(module):
        is_dict = isinstance(node, dict) or (
            isinstance(node, Call) and node.of == object_graph.ORDERED
        )
        # as ``State.module`` has it: what a module's get_extra_state returned stays as
        # it is
        if is_dict and depth < MAX_NESTING and not str(key).endswith("_extra_state"):
            yield from _flattened(node, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", node
