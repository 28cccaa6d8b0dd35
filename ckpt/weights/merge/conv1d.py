"""Which layers have weights that are (in, out): Conv1D of transformers.

PEFT goes by the class of each layer and not by ``fan_in_fan_out`` (0.21.2,
``tuners/lora/model.py: _create_new_module``), so that a square weight's configuration
may say otherwise. The types of models are those whose code makes a Conv1D (transformers
5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckpt.weights.reader import table
from converters.peft.config import AdapterConfig
from converters.peft.merge.model import Merge

TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_MAX_DEPTH = 4  # configurations in one another


def transposed(config: Mapping[str, Any] | None) -> Callable[[str], bool | None]:
    """A function that says whether a module's weight is (in, out).

    The function returns ``None`` where that is not known. It is known of models in the
    table of transformers, not of code beside config.json.
    """
    kinds = {*_types(config or {}, _MAX_DEPTH)}
    custom = bool((config or {}).get("auto_map"))
    native = bool(kinds) and not custom and any(map(table.readers_of_type, kinds))

    def is_transposed(module: str) -> bool | None:
        if not native:
            return None
        return bool(kinds & TYPES) and module.rpartition(".")[2] in LAYERS

    return is_transposed


def notes(
    is_transposed: Callable[[str], bool | None], merge: Merge, config: AdapterConfig
) -> tuple[str, ...]:
    """Notes on square weights that may be of a Conv1D, where no class is known."""
    unsure_modules = [
        module
        for module in (name.removesuffix(".weight") for name in merge.changed)
        if module.rpartition(".")[2] in LAYERS
        and is_transposed(module) is None
        and len({*merge.weights.tensors[f"{module}.weight"].shape}) == 1
    ]
    if not unsure_modules:
        return ()

    sides = "(in, out)" if config.fan_in_fan_out else "(out, in)"

    return (
        f"{unsure_modules[0]}.weight is square, and no config.json of a known model "
        f"says how it lies: taken as {sides}, by fan_in_fan_out of {config.path} or by "
        "layers of the same name",
    )


def _types(config: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The types of a model and of its parts."""
    kind = config.get("model_type")
    if isinstance(kind, str):
        yield kind
    for part in config.values():
        if isinstance(part, Mapping) and depth:
            yield from _types(part, depth - 1)
