"""Files of weights that are published as they are: whether anybody would load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.weights.check.checking import judged
from ckpt.weights.companions import model_folder
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.naming import stored_ties
from ckpt.weights.output.product import Product
from ckpt.weights.reader import untying
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import Check, Request
from converters.errors import CheckpointError
from converters.options import CHECK
from converters.storage import stores
from converters.tensors import TensorRef, Weights
from converters.words import counted, some

# How the names in adapter_model.safetensors begin (peft 0.21, utils/save_and_load.py).
_ADAPTER = (
    "base_model.",
    "prompt_embeddings",
    "prompt_encoder.",
    "adapter_prompt",
    "adaption_",
)


def require_adapter(path: Path, tensors: Mapping[str, TensorRef]) -> None:
    """Raises (kind "unloadable") for an adapter file that PEFT would not load whole.

    Where nobody gathered the weights, ZeRO-3 leaves files of tensors without elements.
    """
    empty = [name for name, ref in tensors.items() if not ref.numel]
    if empty or not tensors:
        problem = f"{counted(len(empty), 'tensor')} without elements" if empty else "no tensor"
        example = f", the first {empty[0]}" if empty else ""
        raise CheckpointError(
            f"{path} has {problem}{example}: the weights were not gathered when it was "
            "written (ZeRO-3), and it would load as an untrained adapter; make it "
            "from the checkpoint's states with ckpt to-fp32, or save it again with "
            "the weights gathered",
            "unloadable",
        )

    foreign = [name for name in tensors if not name.startswith(_ADAPTER)]
    if len(foreign) == len(tensors):
        raise CheckpointError(
            f"{path} has names that PEFT does not know, such as {some(foreign)}; an "
            "adapter's begin with base_model.model.",
            "unloadable",
        )


def require_model(
    root: Path,
    tensors: Mapping[str, TensorRef],
    check: Check = "names",
    untie: bool = False,
) -> LoadVerdict:
    """The verdict on the weights in ``root`` as they are; ``check`` says who judges.

    With ``untie``, config.json is judged as if it tied no embeddings.
    ``CheckpointError`` (kind "unloadable") if they would not load.
    """
    weights = Weights(dict(tensors))
    empty = [name for name, ref in tensors.items() if not ref.numel]
    if empty and 2 * len(empty) >= len(tensors):
        raise CheckpointError(
            f"{root} has {counted(len(empty), 'tensor')} without elements, the first "
            f"{empty[0]}: the weights were not gathered when it was written (ZeRO-3)",
            "unloadable",
        )

    path = root / "config.json"
    config: dict[str, Any] | None = model_folder.read_object(path) if stores.is_file(path) else None
    if check == "none":
        return LoadVerdict(f"not checked ({CHECK('none')})")
    if untie and config is not None:
        config = untying.without_ties(config)

    weights = stored_ties.recognized(weights, root, config)
    product = Product("model", weights, Surroundings(config, path if config else None))

    return judged(product, Audience(root, config, alone=True), Request(check=check))
