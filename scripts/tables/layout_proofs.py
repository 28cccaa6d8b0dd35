"""Whether ckpt writes every tensor of a class as ``save_pretrained`` of transformers does.

A small model of the class gets random values, and its file is compared with what ckpt makes of its
state, bit by bit. Where no small model can be built, the tensors of the default configuration are
bytes, and transformers' own ``revert_weight_conversion`` says what they become; above ``LARGEST``
bytes all sizes are made smaller, equal ones alike. What lies in the layout of the Hub has to stay
as it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_builds import start, time_limit
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion
from try_architectures import tiny

from ckpt.weights.layouts import hub_layout
from ckpt.weights.opening import tensors as reading
from converters.tensors import DType, Extent, Listed, TensorRef, Weights

LARGEST = 400_000_000  # bytes of a state in its own sizes
STEP = 32  # what smaller sizes are multiples of: halves of heads have whole rows
VALUES, BYTES, NOTHING = "values", "bytes", "nothing"
_DTYPES = {
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float64: DType.F64,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
}

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared of a class, and how ckpt differs; or why nothing was compared."""

    name: str
    compared: str
    difference: str | None = None

    @property
    def holds(self) -> bool:
        """Whether something was compared, and is alike."""
        return self.difference is None


@dataclass(frozen=True, slots=True)
class Example:
    """A state, what transformers writes of it, and the config.json that it writes.

    ``unwritten`` are names that the class does not save.
    """

    compared: str
    state: State
    expected: State
    config: Mapping[str, Any]
    unwritten: frozenset[str] = frozenset()


def prove(name: str) -> Proof:
    """The proof of a class, by its name."""
    torch.set_num_threads(1)
    try:
        example = example_of(getattr(transformers, name))
    except Exception as error:
        reason = str(error).partition("\n")[0][:100]
        return Proof(name, NOTHING, f"cannot be built: {type(error).__name__}: {reason}")

    return Proof(name, example.compared, difference(example, name))


def example_of(cls: Any) -> Example:
    """What transformers makes of a model of the class; what it raises where it cannot."""
    torch.manual_seed(0)
    try:
        model = tiny(cls)
    except Exception:
        return default_example(cls)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.uniform_(-1, 1)

    with tempfile.TemporaryDirectory() as folder, time_limit():
        model.save_pretrained(folder, max_shard_size="50GB")
        expected = load_file(Path(folder, "model.safetensors"))
        config = json.loads(Path(folder, "config.json").read_text())

    state = {name: value for name, value in model.state_dict().items() if hasattr(value, "shape")}
    unwritten = frozenset(model._keys_to_ignore_on_save or ())
    return Example(VALUES, state, expected, config, unwritten)


def default_example(cls: Any) -> Example:
    """The same of the class's default configuration, whose tensors are bytes."""
    _, built = start(cls)
    model, tied = built.model, getattr(built.model, "all_tied_weights_keys", None) or ()
    shapes = {name: shape for name, shape in built.memory.items() if name not in tied}
    if sum(torch.Size(shape).numel() for shape in shapes.values()) > LARGEST:
        shapes = smaller(shapes)

    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        for name, shape in shapes.items()
    }
    expected = revert_weight_conversion(model, dict(state))
    config = json.loads(model.config.to_json_string(use_diff=True))

    return Example(BYTES, state, expected, config)


def smaller(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes with small numbers in the place of large ones, equal ones for equal ones."""
    sizes = sorted({size for shape in shapes.values() for size in shape if size > 3 * STEP})
    small_sizes = {size: STEP * (1 + index % 3) for index, size in enumerate(sizes)}
    return {
        name: tuple(small_sizes.get(size, size) for size in shape) for name, shape in shapes.items()
    }


def difference(example: Example, name: str) -> str | None:
    """How ckpt differs from what transformers writes; ``None`` where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        weights = stored(example.state, Path(folder, "state"))
        layout = hub_layout.of(weights, example.config, name)
        if layout.obstacle is not None:
            is_alike = shapes_of(example.state) == shapes_of(example.expected)
            return None if is_alike else f"is left as it is: {layout.obstacle}"

        unlike = list(differences(layout.weights, example))
        if unlike:
            return f"{len(unlike)} tensors differ, such as {', '.join(unlike[:3])}"

        file_weights = stored(example.expected, Path(folder, "expected"))
        again = hub_layout.of(file_weights, example.config, name)
        if again.rule is not None:
            return f"changes what is in the layout of the Hub: {again.rule}"

    return None


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    """The shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(weights: Weights, example: Example) -> Iterator[str]:
    """The tensors that ckpt lacks, has besides, or has with other values, in words."""
    for name, expected in example.expected.items():
        ref = weights.tensors.get(weights.aliases.get(name, name))
        if ref is None:
            yield f"{name} (lacking)"
        elif ref.shape != tuple(expected.shape):
            yield f"{name} (other shape)"
        elif not is_same(ref, expected):
            yield f"{name} (other values)"

    kept_ties = {owner for alias, owner in weights.aliases.items() if alias in example.expected}
    known_names = {*example.expected, *example.unwritten, *kept_ties}
    yield from (f"{name} (new)" for name in weights.tensors if name not in known_names)


def is_same(ref: TensorRef, expected: torch.Tensor) -> bool:
    """Whether two tensors have the same type and bits."""
    value = torch.as_tensor(reading.read(ref, ref.dtype, "pt"))
    return value.dtype == expected.dtype and torch.equal(bits(value), bits(expected))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def stored(state: State, path: Path) -> Weights:
    """A state as weights that lie in a file."""
    refs: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    owners: dict[Any, str] = {}
    offset = 0
    with path.open("wb") as file:
        for name, tensor in state.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner = owners.setdefault(place if tensor.data_ptr() else name, name)
            if owner != name:
                aliases[name] = owner
                continue

            nbytes = tensor.numel() * tensor.element_size()
            file.write(memoryview(bits(tensor).numpy()))
            extents = Listed([Extent(path, offset, nbytes)])
            refs[name] = TensorRef(_DTYPES[tensor.dtype], tuple(tensor.shape), extents)
            offset += nbytes

    return Weights(refs, aliases=aliases)
