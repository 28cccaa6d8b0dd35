"""The results of ``ckpt show``: sizes are bytes, parameters elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.results import TrainingState


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as it is stored: its element type,
    as safetensors calls it, and its shape.

    Of a tensor that no safetensors file could have, the type is torch's word for it,
    such as sparse, and the shape ``None`` where only reading it tells.
    """

    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """One adapter. ``ranks`` are LoRA's;
    ``config`` is the adapter_config.json that was found.

    ``empty_file`` is a file of the adapter whose tensors have no elements.
    """

    name: str | None
    title: str
    peft_type: str | None
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    base_model: str | None
    config: Path | None
    parameters: int
    tensors: int
    frozen: bool
    empty_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """The adapters in a checkpoint.

    ``base_parameters`` are those of the base model that are in the checkpoint, without
    codes and constants of a quantization and what is trained, ``other_parameters`` those
    that are trained and no adapter's; ``other_names`` has the first names of these.
    """

    adapters: tuple[AdapterEntry, ...]
    parameters: int
    base_parameters: int
    other_parameters: int = 0
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFacts:
    """The quantized weights: how many there are by scheme,
    and what their codes stand for.

    ``parameters`` counts the numbers that the codes stand for, ``uncounted_weights`` the
    weights of which that is not known, ``missing_weights`` those whose codes are not in
    the checkpoint.
    """

    schemes: Mapping[str, int]
    weights: int
    missing_weights: int
    constants: int
    parameters: int
    uncounted_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowResult(TrainingState):
    """A checkpoint, from its headers.

    ``tensors`` counts them; ``tensors_by_name`` is there where ``--tensors`` asks for
    it. ``nbytes`` are those of the ``file_count`` files, ``weight_bytes`` those of the
    weights. ``missing`` has names without values, and why. ``aliases`` lead to the
    tensors that they share. ``values`` are the plain values beside the tensors of a
    single file of ``torch.save``, as text; ``None`` for a checkpoint of a training.
    ``state`` and ``reason`` are as in ``CheckpointEntry``, and null for what is not a
    checkpoint of a training, or in a store. ``tensor_ranks``, ``pipeline_stages`` and
    ``expert_ranks`` are null where nothing but ZeRO splits the model.
    """

    parameters: int
    tensors: int
    dtypes: tuple[str, ...]
    weight_bytes: int
    nbytes: int
    file_count: int
    buffers: tuple[str, ...]
    aliases: Mapping[str, str]
    missing: Mapping[str, str]
    whole: bool
    adapter: AdapterFacts | None
    quantized: QuantizedFacts | None
    tensors_by_name: Mapping[str, TensorEntry] | None
    values: Mapping[str, str] | None
    notes: tuple[str, ...]
    state: str | None
    reason: str | None
    tensor_ranks: int | None
    pipeline_stages: int | None
    expert_ranks: tuple[int, ...] | None
