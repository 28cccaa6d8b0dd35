"""The operations of ``save_pretrained`` on tensors: it cuts them, joins them, and
changes their order.

Each operation takes tensors by the pattern of their names and returns tensors by other
patterns (transformers 5.23, core_model_loading.py, the classes of the same names). None
of them changes a value, so each is an arrangement
(``converters.computing.arrangement``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt.weights.reader.lengths import look_up
from converters.computing.arrangement import View, joined
from converters.tensors import TensorRef

Tensors = dict[str, TensorRef]  # by the pattern of their names


class NotArrangedError(Exception):
    """Tensors that the operations of their rule do not fit."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of an operation: the patterns of its rule, and config.json."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    config: Mapping[str, Any]

    def number(self, field: list[Any]) -> int:
        """The number in a field, or the default of transformers where it left that out.

        Only transformers 5 leaves out what is a default and always writes a number under
        the same name. A config.json of the Hub may have it under an older one (``heads``
        of ``vision_config``, modeling of step3p7), so that its default is not known to
        hold.
        """
        path, default = field
        stated = look_up(self.config, path)
        if stated is None and not str(self.config.get("transformers_version")).startswith("5."):
            raise NotArrangedError(f"{path} is not in config.json")

        number = default if stated is None else stated
        if type(number) is not int or number < 1:
            raise NotArrangedError(f"{path} of config.json is {number!r}, expected a number")
        return number


def apply(operations: list[list[Any]], tensors: Tensors, setting: Setting) -> Tensors:
    """The tensors after all operations; ``NotArrangedError`` where they do not fit."""
    for name, *numbers in operations:
        operation = _OPERATIONS.get(name)
        if operation is None:
            raise NotArrangedError(f"{name} is not an operation that ckpt knows")

        try:
            tensors = operation(tensors, setting, *numbers)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise NotArrangedError(f"{name}: {error}") from error

    return tensors


def _only(tensors: Tensors) -> TensorRef:
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, expected one")
    return next(iter(tensors.values()))


def _all(tensors: Tensors, setting: Setting) -> list[TensorRef]:
    """The tensors in the order of the rule."""
    lacking = [source for source in setting.sources if source not in tensors]
    if lacking:
        raise ValueError(f"{lacking[0]} is not there, which is written as a part of another tensor")
    return [tensors[source] for source in setting.sources]


def _split_list(tensors: Tensors, setting: Setting, dim: int) -> Tensors:
    """Each member of a dimension as a tensor of its own."""
    members: Tensors = {}
    for source, tensor in tensors.items():
        pattern = setting.targets[0] if len(tensors) == 1 else source
        view = View.of(tensor)
        shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
        for index in range(tensor.shape[dim]):
            target = pattern.replace("*", str(index))
            members[target] = view.member(dim, index).tensor(*shape)

    return members


def _chunk(tensors: Tensors, setting: Setting, dim: int, field: list[Any] | None = None) -> Tensors:
    """A tensor in parts of equal size along a dimension,
    of which the last may be smaller."""
    tensor = _only(tensors)
    targets = list(setting.targets)
    if field is not None:
        targets = [targets[0].replace("*", str(i)) for i in range(setting.number(field))]

    step = -(-tensor.shape[dim] // len(targets))
    chunks: Tensors = {}
    for index, target in enumerate(targets):
        start, stop = index * step, min((index + 1) * step, tensor.shape[dim])
        if start < stop or index == 0:
            chunks[target] = _narrowed(tensor, dim, start, stop - start)

    return chunks


def _narrowed(tensor: TensorRef, dim: int, start: int, length: int) -> TensorRef:
    view = View.of(tensor).narrow(dim, start, length)
    return view.tensor(*view.shape)


def _concatenate(tensors: Tensors, setting: Setting, dim: int) -> Tensors:
    """Tensors joined along a dimension, in the order of the rule."""
    return {setting.targets[0]: joined(_all(tensors, setting), dim)}


def _interleave(tensors: Tensors, setting: Setting, dim: int, inverse: bool) -> Tensors:
    """The two halves of a dimension, member by member in turn; or the other way round."""
    tensor = _only(tensors)
    half = tensor.shape[dim] // 2
    outer, inner = (2, half) if inverse else (half, 2)
    view = View.of(tensor).split(dim, outer, inner).transposed(dim, dim + 1)
    return {setting.targets[0]: view.tensor(*tensor.shape)}


def _transpose(
    tensors: Tensors, setting: Setting, first: int, second: int, is_checked: bool
) -> Tensors:
    """Two dimensions exchanged;
    with ``is_checked`` only where the model has another shape.

    What is saved has the model's shape, so the latter never changes anything.
    """
    tensor = _only(tensors)
    if is_checked:
        return {setting.targets[0]: tensor}

    view = View.of(tensor).transposed(first, second)
    return {setting.targets[0]: view.tensor(*view.shape)}


def _permute_for_rope(
    tensors: Tensors, setting: Setting, field: list[Any], chosen: list[str] | None
) -> Tensors:
    """Rows of each head whose halves take turns, as complex rotary embeddings want them."""
    heads = setting.number(field)
    permuted: Tensors = {}
    for source, tensor in tensors.items():
        is_only = len(setting.sources) == 1 and len(setting.targets) == 1
        target = setting.targets[0] if is_only else source
        if chosen is not None and not any(name in source for name in chosen):
            permuted[target] = tensor
            continue

        rows = tensor.shape[0] // heads
        view = View.of(tensor).split(0, heads, rows).split(1, 2, rows // 2).transposed(1, 2)
        permuted[target] = view.tensor(*tensor.shape)

    return permuted


def _split_text_and_vision(
    tensors: Tensors, setting: Setting, stack_dim: int, concat_dim: int
) -> Tensors:
    """The experts of a text and of a vision model,
    cut and put into one list (Ernie 4.5 VL)."""
    members: dict[str, list[TensorRef]] = {target: [] for target in setting.targets}
    for tensor in _all(tensors, setting):
        step = -(-tensor.shape[concat_dim] // len(setting.targets))
        for index, target in enumerate(setting.targets):
            length = min(step, tensor.shape[concat_dim] - index * step)
            view = View.of(tensor).narrow(concat_dim, index * step, length)
            for number in range(tensor.shape[stack_dim]):
                member = view.member(stack_dim, number)
                members[target].append(member.tensor(*member.shape))

    return {
        target.replace("*", str(index)): member
        for target, listed in members.items()
        for index, member in enumerate(listed)
    }


_OPERATIONS: dict[str, Callable[..., Tensors]] = {
    "SplitModulelist": _split_list,
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "Interleave": _interleave,
    "Transpose": _transpose,
    "PermuteForRope": _permute_for_rope,
    "ErnieSplitAndDecoupleTextVisionExperts": _split_text_and_vision,
}
