"""The tensors of a running DeepSpeed training:
names, shapes and types, the same on every rank.

Source: DeepSpeed 0.19.8 ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py``
(shapes of what ``engine.offload_states`` took away) and ``partition_parameters.py``
(``ds_shape``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.splitting import split_tensors, whole
from ckpt.engine.splitting.part import ModelPart
from ckpt.engine.splitting.placing import Placing
from ckpt.engine.splitting.split_tensors import SplitEngine
from ckpt.engine.splitting.whole import Share, TiedName
from ckpt.engine.view import EngineView, require_engine
from ckpt.weights.naming import naming
from ckpt.weights.request import Naming
from converters import quantized
from converters.errors import CheckpointError
from converters.tensors import DType, Extent, Listed, TensorRef, Weights

MEMORY = Path("live")  # the "file" that the tensors of a running engine are located in
DTYPES = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.int16: DType.I16,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.int32: DType.I32,
    torch.float32: DType.F32,
    torch.complex64: DType.C64,
    torch.float64: DType.F64,
    torch.int64: DType.I64,
}
_NEWER = {  # types that not every torch has
    "float8_e8m0fnu": DType.F8_E8M0,
    "float8_e4m3fnuz": DType.F8_E4M3FNUZ,
    "float8_e5m2fnuz": DType.F8_E5M2FNUZ,
    "float4_e2m1fn_x2": DType.F4,
    "uint16": DType.U16,
    "uint32": DType.U32,
    "uint64": DType.U64,
}
DTYPES |= {getattr(torch, name): dtype for name, dtype in _NEWER.items() if hasattr(torch, name)}
TORCH = {dtype: kind for kind, dtype in DTYPES.items()}

Parts = Mapping[str, ModelPart]  # by a rank's own names
PartNames = Callable[[Parts, Sequence[TiedName]], tuple[dict[str, ModelPart], list[TiedName]]]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The model's tensors by name; a tied parameter under its first name only.

    ``weights`` locates nothing: its extents say how long tensors are, not where.
    ``renamed`` are those that are to be written under other names, ``names`` maps the
    model's names to these; what it lacks is left out.

    Where ranks have other tensors or boxes of them (``split_tensors``), ``weights`` are
    those of the whole model, ``parameters`` and ``buffers`` this rank's own under its
    own names, and ``shares`` what it gives of each. Of the tensors in ``placings``
    elements are counted box by box.
    """

    weights: Weights
    parameters: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor]
    renamed: Weights | None = None
    names: Mapping[str, str] | None = None
    shares: Mapping[str, Share] | None = None
    placings: Mapping[str, Placing] = field(default_factory=dict)

    def own_size(self, name: str) -> int:
        """The elements that a tensor has on this rank, were it not partitioned by ZeRO."""
        if self.shares is not None:
            return self.shares[name].size
        return self.weights.tensors[name].numel

    @property
    def written_placings(self) -> dict[str, Placing]:
        """``placings`` by the names that the tensors get."""
        names = {name: self.written_name(name) for name in self.placings}
        return {new: self.placings[name] for name, new in names.items() if new is not None}

    @property
    def written(self) -> Weights:
        """The tensors that are written, by the names that they get."""
        return self.weights if self.renamed is None else self.renamed

    def written_name(self, name: str) -> str | None:
        """The name that a tensor of the model gets; ``None`` if it is not written."""
        return name if self.names is None else self.names.get(name)


def inventory(
    engine: EngineView,
    wishes: Naming | None = None,
    ranks: RankGroup | None = None,
    part_names: PartNames | None = None,
) -> Inventory:
    """The tensors that ``engine`` (of ``deepspeed.initialize``) trains, in the model's
    order, buffers included.

    ``wishes`` choose among the tensors and rename them. With ``ranks`` every rank calls
    it, and where ranks have different tensors they agree on those of the whole model.
    ``part_names`` gives the parts of such tensors other names, or those of others.

    ``CheckpointError`` for what is not such an engine, and for kinds of parallelism that
    are not followed.
    """
    _require_supported(engine, ranks)
    module = engine.module
    entries = module.state_dict(keep_vars=True)
    parameters, aliases = _named_parameters(module, entries)
    parameter_names = {*parameters, *aliases}
    buffers = {
        name: value
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and name not in parameter_names
    }
    refs = _refs(engine, parameters, buffers)
    all_names = (*entries, *refs, *aliases)
    present = (name for name in all_names if name in refs or name in aliases)
    order = tuple(dict.fromkeys(present))
    if ranks is not None and split_tensors.is_split(engine):
        of_rank = _RankTensors(parameters, buffers, refs, aliases, order)
        model_inventory = _agreed(cast(SplitEngine, engine), ranks, of_rank, part_names)
    else:
        tensors = {name: refs[name] for name in order if name in refs}
        frozen = frozenset(name for name, value in parameters.items() if not value.requires_grad)
        weights = Weights(tensors, aliases, frozenset(buffers), order=order, frozen=frozen)
        model_inventory = Inventory(_marked(weights), parameters, buffers)

    if wishes is None or not wishes.changes:
        return model_inventory
    return _renamed(model_inventory, wishes)


def _renamed(model_inventory: Inventory, wishes: Naming) -> Inventory:
    """The inventory with the names that ``wishes`` give,
    of the tensors that they choose."""
    weights = model_inventory.weights
    renamed = naming.wished(weights, wishes)
    model_names = {id(ref): name for name, ref in weights.tensors.items()}
    names = {model_names[id(ref)]: name for name, ref in renamed.tensors.items()}
    return replace(model_inventory, renamed=renamed, names=names)


class _RankTensors(NamedTuple):
    """The tensors of this rank, under its own names."""

    parameters: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor]
    refs: Mapping[str, TensorRef]
    aliases: Mapping[str, str]
    order: Sequence[str]


def _agreed(
    engine: SplitEngine,
    ranks: RankGroup,
    of_rank: _RankTensors,
    part_names: PartNames | None,
) -> Inventory:
    """The inventory of the whole model, of which this rank has its own tensors."""
    split = split_tensors.SplitTensors.of(engine)
    parts = split_tensors.tensors_of_rank(
        split, of_rank.parameters, of_rank.buffers, of_rank.refs, of_rank.order
    )
    ties = [
        TiedName(
            split.whole_name(name),
            split.whole_name(owner),
            split.order(name, of_rank.order.index(name)),
        )
        for name, owner in of_rank.aliases.items()
    ]
    if part_names is not None:
        parts, ties = part_names(parts, ties)
    model = whole.agreed(ranks, list(parts.values()), ties)
    tensors = {
        name: tensor_ref(name, TORCH[tensor.dtype], tensor.placing.shape)
        for name, tensor in model.tensors.items()
    }
    weights = Weights(
        tensors,
        model.aliases,
        frozenset(name for name, tensor in model.tensors.items() if tensor.is_buffer),
        order=model.order,
        frozen=frozenset(name for name, tensor in model.tensors.items() if tensor.is_frozen),
    )
    placings = {
        name: tensor.placing
        for name, tensor in model.tensors.items()
        if not tensor.placing.is_row_major
    }
    shares = whole.shares(parts, model.tensors)
    parameters = of_rank.parameters
    buffers = {name: buffer for name, buffer in of_rank.buffers.items() if name in parts}
    return Inventory(_marked(weights), parameters, buffers, shares=shares, placings=placings)


def _marked(weights: Weights) -> Weights:
    """The weights, with those marked that are codes of quantized ones."""
    return replace(weights, packed=quantized.marked(weights).packed)


def _refs(
    engine: EngineView, parameters: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
) -> dict[str, TensorRef]:
    """The type and shape of each tensor of this rank,
    as it were without ZeRO's partitions."""
    shapes = _shapes(engine)
    refs: dict[str, TensorRef] = {}
    for name, parameter in parameters.items():
        shape = shapes.get(id(parameter), parameter.shape)
        refs[name] = tensor_ref(name, parameter.dtype, shape)
    for name, buffer in buffers.items():
        refs[name] = tensor_ref(name, buffer.dtype, buffer.shape)
    return refs


def _named_parameters(
    module: torch.nn.Module, entries: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters by the names that the state dict has for them, and the tied names.

    A hook on the state dict may call them otherwise than ``named_parameters`` does;
    what it drops keeps its own name.
    """
    names_by_id: dict[int, list[str]] = {}
    parameters_by_id: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
        parameters_by_id[id(parameter)] = parameter

    state_names: dict[int, list[str]] = {}
    for name, value in entries.items():
        if id(value) in names_by_id:
            state_names.setdefault(id(value), []).append(name)

    parameters: dict[str, Any] = {}
    aliases: dict[str, str] = {}

    for key, names in names_by_id.items():
        if not set(state_names.get(key, ())) <= set(names):
            names = state_names[key]
        parameters[names[0]] = parameters_by_id[key]
        aliases |= dict.fromkeys(names[1:], names[0])

    return parameters, aliases


def _require_supported(engine: EngineView, ranks: RankGroup | None) -> None:
    require_engine(engine)
    if split_tensors.is_split(engine):
        if ranks is not None:
            return
        raise CheckpointError(
            "this engine has tensor or pipeline parallelism or experts, whose adapters are not "
            "read live; pass weights=None, and ckpt to-fp32 makes the adapter of the checkpoint",
            "unsupported",
        )

    world = dist.get_world_size()
    optimizer = engine.optimizer
    groups = [
        *getattr(optimizer, "real_dp_process_group", ()),
        *getattr(optimizer, "sub_group_process_groups", ()),
        *(getattr(tensor, "ds_process_group", None) for tensor in engine.module.parameters()),
    ]
    worlds = {dist.get_world_size(group) for group in groups if group is not None}
    if worlds - {world}:
        raise CheckpointError(
            "this engine has parameters partitioned over some of the ranks only (MiCS), which is "
            "not read live; use engine.save_checkpoint",
            "unsupported",
        )


def _shapes(engine: EngineView) -> dict[int, Sequence[int]]:
    """Shapes of parameters whose own storage may be elsewhere, by ``id``."""
    shapes: dict[int, Sequence[int]] = {
        id(parameter): parameter.ds_shape
        for parameter in engine.module.parameters()
        if hasattr(parameter, "ds_shape")
    }
    groups = getattr(engine.optimizer, "round_robin_bit16_groups", ())
    # since offload_states exists
    metas = getattr(engine.optimizer, "round_robin_bit16_meta", ())
    for group, meta in zip(groups, metas, strict=False):
        shapes |= {
            id(parameter): placeholder.shape
            for parameter, placeholder in zip(group, meta, strict=True)
        }
    return shapes


def tensor_ref(name: str, torch_dtype: torch.dtype, shape: Sequence[int]) -> TensorRef:
    """A tensor in memory; ``CheckpointError`` for an element type that is not written."""
    if torch_dtype not in DTYPES:
        raise CheckpointError(
            f"{name} is of type {torch_dtype}, which is not written", "unsupported"
        )

    dtype = DTYPES[torch_dtype]
    nbytes = prod(shape) * dtype.itemsize
    extents = Listed([Extent(MEMORY, 0, nbytes)] if nbytes else [])
    return TensorRef(dtype, tuple(shape), extents)


def config_of(module: Any) -> Any:
    """A copy of a Hugging Face model's configuration that names its class;
    ``None`` without one.

    ``None`` for PEFT too: its names are not those of the model that the configuration
    is of.
    """
    config = getattr(module, "config", None)
    is_hugging_face = hasattr(config, "save_pretrained") and hasattr(config, "to_dict")
    if not is_hugging_face or hasattr(module, "peft_config"):
        return None
    named_config: Any = deepcopy(config)
    kind = type(module).__name__
    classes = [
        class_name(module) if name == kind else name for name in named_config.architectures or ()
    ]
    named_config.architectures = classes or [class_name(module)]
    return named_config


def class_name(module: Any) -> str:
    """The name of a model's class, without what ``fully_shard`` puts before it.

    Source: torch 2.13 ``distributed/fsdp/_fully_shard/_fully_shard.py``: a class "FSDP..."
    of ``FSDPModule`` and the model's own.
    """
    kind = type(module)
    is_sharded = kind.__bases__[0].__name__ == "FSDPModule" and len(kind.__bases__) > 1
    return str((kind.__bases__[1] if is_sharded else kind).__name__)
