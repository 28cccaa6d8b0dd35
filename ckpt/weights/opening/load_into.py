"""Weights of a checkpoint into a model, in place,
and DeepSpeed out of it (``placeholders``)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from ckpt.engine import placeholders
from ckpt.engine.placeholders import full_shape
from ckpt.weights.naming import naming
from ckpt.weights.opening import tensors, unusual
from converters import words
from converters.errors import CheckpointError
from converters.execute.workers import MOVE_BYTES
from converters.source import Source
from converters.storage import open_files
from converters.tensors import TensorRef, Weights
from converters.words import counted, some, verb

log = logging.getLogger("ckpt")
_PEFT_PREFIX = "base_model.model."


def load(model: nn.Module, source: Source) -> nn.Module:
    """The model on the CPU with the weights in it; see ``zero_to_fp32``."""
    targets = _targets(model)
    weights = naming.like(source.weights, targets)
    buffers = {
        name: tensor
        for name, tensor in unusual.tensors_of(source).items()
        if name in targets and name in weights.absent
    }
    _check(targets, weights, buffers.keys(), str(source.place.folder))
    model = model.cpu()
    placeholders.undo(model)
    filled: set[int] = set()
    for name, target in _targets(model).items():
        ref = weights.tensors.get(weights.aliases.get(name, name))
        if ref is not None and id(target) not in filled:  # tied names are one parameter
            _fill(target, ref)
            filled.add(id(target))
        elif name in buffers:  # of types that only torch has
            target.data.copy_(torch.as_tensor(buffers[name].read("pt")))

    return model


def _targets(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied names too."""
    names = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in names.items() if isinstance(tensor, torch.Tensor)}


def _check(
    targets: Mapping[str, torch.Tensor],
    weights: Weights,
    buffers: Collection[str],
    where: str,
) -> None:
    """Raises unless every tensor of the model has a value of its shape, or may stay.

    A tensor that the checkpoint does not hold keeps its own values if it is a buffer,
    or frozen in the model. One warning names such tensors. ``buffers`` are those that
    are read another way.
    """
    missing, mismatches, filled = [], [], set()
    for name, target in targets.items():
        ref = weights.tensors.get(weights.aliases.get(name, name))
        if ref is None:
            if name not in buffers:
                missing.append(name)
            continue

        filled.add(id(target))
        if ref.shape != full_shape(target):
            model_shape, stored_shape = words.shape(full_shape(target)), words.shape(ref.shape)
            mismatches.append(f"{name} is {model_shape}, stored as {stored_shape}")

    # tied to one that is there
    missing = [name for name in missing if id(targets[name]) not in filled]
    unchanged = [name for name in missing if filled and _stays(targets[name])]
    missing = [name for name in missing if name not in set(unchanged)]
    extra = [name for name in (*weights.tensors, *weights.aliases) if name not in targets]
    if missing or mismatches:
        problems = "; ".join(_problems(missing, mismatches, extra, weights))
        if _has_wrapper(extra) and not _has_wrapper(targets):
            problems += (
                "; the checkpoint is of a PEFT model: give the model that get_peft_model or "
                "PeftModel.from_pretrained made"
            )
        raise CheckpointError(f"{where}: {problems}", "incomplete")

    if unchanged:
        log.warning("%s: %s", where, _stays_line(unchanged, targets))
    if extra:
        log.warning("%s: not in the model: %s", where, _some(extra))


def _has_wrapper(names: Iterable[str]) -> bool:
    """Whether names are those of a model that PEFT wraps."""
    return any(name.startswith(_PEFT_PREFIX) for name in names)


def _problems(
    missing: list[str], mismatches: list[str], extra: list[str], weights: Weights
) -> Iterator[str]:
    """How the checkpoint and the model differ."""
    if missing:
        tensors, have = counted(len(missing), "tensor"), verb(len(missing), "has", "have")
        yield f"{tensors} of the model {have} no value: {_some(missing)}"
    if mismatches:
        have = verb(len(mismatches), "has", "have")
        yield f"{len(mismatches):,} {have} another shape: {_some(mismatches)}"
    if extra:
        are = verb(len(extra), "is", "are")
        yield f"{counted(len(extra), 'name')} {are} not the model's: {_some(extra)}"

    absent = [f"{name}: {weights.absent[name]}" for name in missing if name in weights.absent]
    if absent:
        yield f"absent: {_some(absent)}"


def _stays(target: torch.Tensor) -> bool:
    """Whether a tensor without a value may stay:
    it is neither trained nor a placeholder."""
    trained = isinstance(target, nn.Parameter) and target.requires_grad
    return not trained and tuple(target.shape) == full_shape(target)


def _stays_line(names: list[str], targets: Mapping[str, torch.Tensor]) -> str:
    frozen = [name for name in names if isinstance(targets[name], nn.Parameter)]
    buffers = [name for name in names if name not in set(frozen)]
    kinds = (("frozen parameter", frozen), ("buffer", buffers))
    group_texts = [
        f"{counted(len(group), kind)} ({_some(group)})" for kind, group in kinds if group
    ]
    return f"not in the checkpoint, so left as they are in the model: {', '.join(group_texts)}"


def _some(names: list[str]) -> str:
    return some(names, 4)


def _fill(target: torch.Tensor, ref: TensorRef) -> None:
    """The stored values into the tensor's own storage, a chunk at a time."""
    flat = target.data.reshape(-1)
    is_contiguous = flat.data_ptr() == target.data.data_ptr()
    has_same_type = tensors.torch_dtype(ref.dtype) is target.dtype
    step = MOVE_BYTES // ref.dtype.itemsize
    for start in range(0, ref.numel, step):
        count = min(step, ref.numel - start)
        part = ref.narrow(start, count)
        if has_same_type and is_contiguous:
            open_files.read_extents(
                flat[start : start + count].view(torch.uint8).numpy().data, part.extents
            )
        else:
            flat[start : start + count] = torch.as_tensor(tensors.read(part, ref.dtype, "pt"))

    if not is_contiguous:  # reshape made a copy of a strided tensor
        target.data.copy_(flat.reshape(target.shape))
