"""Would PEFT make the layers that the tensors are of,
by a configuration? No more, and no fewer.

PEFT drops a trained layer that the configuration leaves out without a word, and breaks
off where it names a module, rows or biases of which there are no tensors. Source: PEFT
0.21.2 ``check_target_module_exists`` in ``tuners/tuners_utils.py``,
``set_peft_model_state_dict`` in ``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from converters.peft import patterns
from converters.peft.config import AdapterConfig

HEADS = ("classifier", "score", "qa_outputs")  # PEFT lists them, whichever the model has
# of LoRA, by the model's type: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
_DEFAULTS = tuple(
    frozenset(endings.split())
    for endings in (
        *("q v", "q_proj v_proj", "q v q_proj v_proj", "c_attn", "query_key_value"),
        *("query value", "query_proj value_proj", "in_proj", "Wqkv", "c_proj c_attn"),
        *("qkv_proj", "q_proj v_proj fc1 fc2", "q_proj k_proj v_proj o_proj"),
        *("key value receptance output", "r_proj k_proj v_proj o_proj key value"),
    )
)


@dataclass(frozen=True, slots=True)
class TrainedLayers:
    """The facts that tensors show of an adapter beside kind and ranks.

    ``modules`` are the adapted ones, ``saved`` those that are trained whole, ``tokens``
    the numbers of trained rows by embedding, ``biased`` whether LoRA's factors have
    biases, ``unadapted`` the modules of the checkpoint that no adapter touches.
    """

    modules: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: tuple[tuple[str, int | None], ...]
    biased: bool
    unadapted: frozenset[str]


def left_out(config: AdapterConfig, module: str) -> str | None:
    """The entry of the configuration that keeps PEFT
    from adapting a module that is a target."""
    if _excluded(config.values.get("exclude_modules"), module):
        return "its exclude_modules leave out"

    layers = config.values.get("layers_to_transform")
    listed = config.target_modules
    if layers in (None, []) or listed is None or isinstance(listed, str):
        return None
    if module in listed:
        return None

    layer = _layer(config.values.get("layers_pattern"), module)
    chosen = layers if isinstance(layers, list) else [layers]
    if layer in chosen:
        return None
    return f"its layers_to_transform ({_short(layers)}) leave out"


def _excluded(excluded: Any, module: str) -> bool:
    if isinstance(excluded, str):
        return excluded != "" and patterns.matches(excluded, module)
    if not isinstance(excluded, list):
        return False

    parts = module.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    return any(isinstance(name, str) and name in ends for name in excluded)


def _layer(pattern: Any, module: str) -> int | None:
    """The number of a module's layer: the first that stands behind a name,
    or one of the names."""
    names = [pattern] if isinstance(pattern, str) else pattern
    names = [name for name in names or () if isinstance(name, str)]
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if not part.isdecimal() or len(part) > 9:
            continue
        before = ".".join(parts[:index])
        if any(patterns.ends_with(name, before) for name in names) or (not names and index > 1):
            return int(part)

    return None


def unchosen(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    """Why PEFT would choose other targets than those that are adapted;
    of no targets, its own."""
    if config.target_modules is not None or config.values.get("target_parameters"):
        return None
    if config.peft_type != "LORA" or not trained.modules:
        return None

    ends = frozenset(module.rpartition(".")[2] for module in trained.modules)
    if ends in _DEFAULTS:
        return None
    return f"it has no target_modules, and the tensors adapt {_short(sorted(ends))}"


def without_tensors(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    """The layers that the configuration demands and the tensors lack,
    or the other way round."""
    reasons = (_saved(config, trained), _tokens(config, trained), _biases(config, trained))
    return next((reason for reason in reasons if reason is not None), None)


def _saved(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    if config.values.get("ensure_weight_tying"):
        return None

    lacking = [
        name
        for name in config.modules_to_save
        if not any(module.endswith(name) for module in trained.saved)
    ]

    untrained = [
        name for name in lacking if any(module.endswith(name) for module in trained.unadapted)
    ]
    other_modules = [name for name in config.modules_to_save if name not in HEADS]
    if not untrained and trained.saved:
        return None  # it may list modules that this model does not have

    untrained_names = untrained or [name for name in other_modules if name in lacking]
    if not untrained_names:
        return None

    names = _short(untrained_names)
    return f"its modules_to_save are {names}, of which the tensors have no trained copy"


def _tokens(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    name = "token_indices" if config.peft_type == "TRAINABLE_TOKENS" else "trainable_token_indices"
    counts = {len(rows) for rows in config.token_indices.values() if rows}
    if counts and not trained.tokens:
        return f"it has {name}, and the tensors no trained rows (trainable_tokens_delta)"

    for module, rows in trained.tokens:
        if not config.token_indices:
            return f"it has no {name}, and the tensors have trained rows of {module}"
        if rows is not None and rows not in counts:
            of_config = ", ".join(map(str, sorted(counts)))
            return f"its {name} are {of_config}, and the tensors have {rows} rows of {module}"

    return None


def _biases(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    if config.peft_type != "LORA" or config.lora_bias == trained.biased or not trained.modules:
        return None
    if config.lora_bias:
        return "it says lora_bias, and the tensors have no bias of lora_B"
    return "it says no lora_bias, and the tensors have a bias of lora_B"


def unscaled(config: AdapterConfig, trained: TrainedLayers) -> str | None:
    """The problem of a LoRA without ``lora_alpha``:
    PEFT would take 8, whatever the training had."""
    if config.peft_type != "LORA" or config.lora_alpha is not None:
        return None
    if all(config.alpha(module) is not None for module in trained.modules):
        return None
    return "it has no lora_alpha, which scales the adapter"


def _short(values: Any) -> str:
    items: Iterator[Any] = iter(values if isinstance(values, list) else [values])
    text = ", ".join(str(item) for item, _ in zip(items, range(6), strict=False))
    return text if len(text) <= 120 else f"{text[:117]}..."
