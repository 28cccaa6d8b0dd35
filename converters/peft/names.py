"""The name of a parameter of a PEFT model, taken apart.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    |-- prefix -----||-- module -------------------| |role| |adapter| |rest|

What PEFT puts into a model of a user's, by role:

    lora_A, ia3_l, hada_w1_a, ...  a layer's adapter: module.role.adapter[.rest]
    base_layer                     the layer that is adapted: module.base_layer.rest
    modules_to_save                a trained copy of a module: module.modules_to_save.adapter.rest
    original_module                the module that was copied: module.original_module.rest
    trainable_tokens_delta         trained rows: module.token_adapter.trainable_tokens_delta.adapter
    prompt_encoder                 a trained prompt: prompt_encoder.adapter.rest
    base                           any other parameter, of the user's model
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from converters.peft.kinds import ROLES

MODEL = "base_model.model."  # what a PeftModel puts before every name of the model's
WRAPPER = "base_model."  # before those of a model that only gets a prompt, and of its own tensors
DEFAULT = "default"  # the adapter that ``get_peft_model`` makes, where it is not told a name
BASE = "base"
BASE_LAYER = "base_layer"
ORIGINAL = "original_module"
SAVED = "modules_to_save"
TOKENS = "trainable_tokens_delta"
TOKEN_ADAPTER = "token_adapter"
PROMPT = "prompt_encoder"
_HINTS = (SAVED, PROMPT, *ROLES)
_ENCODER = (
    *("embedding", "mlp_head", "lstm_head", "transform"),
    *("prefix_task_cols", "prefix_task_rows", "delta_embedding"),
)
_OWN = ("weight", "bias")  # X.lora_A.weight: a LoRA that is not PEFT's, which has no adapter's name
_MODULES = (  # roles that are modules with such parameters; X.ia3_l.weight is of adapter "weight"
    *("lora_A", "lora_B", "lora_magnitude_vector", "lora_diag", "lora_arrow", "lora_velora_embed"),
    *("lora_monteclora_sampler", "oft_R", "oft_embedding_R", "ln_tuning_layers"),
    *("lily_A", "lily_B", "lily_router"),
)


class ParsedName(NamedTuple):
    """A name, taken apart.

    ``prefix`` is ``base_model.model.``, ``base_model.`` or nothing, behind whatever a
    model that holds the PEFT model as a part of it puts before (``llm.``). ``module`` is
    the path of the module in the user's model, without what PEFT put into it, and
    without the parameter's own name unless the role is ``base`` (then the whole name is
    in ``module`` and ``rest``). ``adapter`` is ``None`` for what belongs to no adapter.
    ``rest`` is what follows, such as ``weight``, or "".
    """

    name: str
    prefix: str
    module: str
    role: str
    adapter: str | None = None
    rest: str = ""

    @property
    def of_tokens(self) -> bool:
        """Whether the parameter holds an embedding's trained rows,
        beside another adapter."""
        return f".{TOKEN_ADAPTER}.{TOKENS}." in self.name

    @property
    def original(self) -> str:
        """The name in the user's model of what this parameter is,
        is copied from, or changes.

        Of a layer's adapter: the name of the layer. ``rest`` is kept for everything
        else.
        """
        parts = [self.module] if self.role in ROLES else [self.module, self.rest]
        return ".".join(part for part in parts if part)


@lru_cache(maxsize=4096)
def parsed(name: str) -> ParsedName:
    """A parameter's name taken apart.
    Any name has parts: those of another model are ``base``."""
    prefix = _prefix(name)
    parts = name[len(prefix) :].split(".")
    if PROMPT in parts[:-2]:
        index = parts.index(PROMPT)
        inside = parts[index + 2 :]
        if inside[0] in _ENCODER:  # other models have a prompt_encoder too, without adapters in it
            head = prefix + _path([*parts[:index], ""])
            return ParsedName(name, head, "", PROMPT, parts[index + 1], _path(inside))

    for index, part in enumerate(parts):
        later_parts = parts[index + 1 :]
        if index and is_role(parts[index - 1]):  # then it is the name of an adapter
            continue
        if part == SAVED and len(later_parts) > 1:
            module, adapter = _path(parts[:index]), later_parts[0]
            remainder = _path(later_parts[1:])
            return ParsedName(name, prefix, module, SAVED, adapter, remainder)
        if part == ORIGINAL and later_parts:
            module = _path(parts[:index])
            return ParsedName(name, prefix, module, ORIGINAL, None, _path(later_parts))

    for index in reversed(range(len(parts) - 1)):
        if _has_adapter(parts, index):
            module = _path(part for part in parts[:index] if part != TOKEN_ADAPTER)
            remainder = _path(parts[index + 2 :])
            role, adapter = parts[index], parts[index + 1]
            return ParsedName(name, prefix, module, role, adapter, remainder)

    if BASE_LAYER in parts[:-1]:
        layer_index = len(parts) - 1 - parts[::-1].index(BASE_LAYER)
        added = (BASE_LAYER, TOKEN_ADAPTER)
        module = _path(part for part in parts[:layer_index] if part not in added)
        remainder = _path(parts[layer_index + 1 :])
        return ParsedName(name, prefix, module, BASE_LAYER, None, remainder)

    return ParsedName(name, prefix, _path(parts[:-1]), BASE, None, parts[-1])


def _prefix(name: str) -> str:
    """What stands before the path in the user's model:
    the end of the last wrapper of PEFT."""
    for head in (MODEL, WRAPPER):
        start = 0 if name.startswith(head) else name.find(f".{head}") + 1
        if start or name.startswith(head):
            return name[: start + len(head)]
    return ""


def _has_adapter(parts: Sequence[str], index: int) -> bool:
    """Whether a part of a name is a role, and what follows the name of an adapter.

    An adapter may be called as a role is: X.lora_A.lora_B.weight is of "lora_B".
    """
    if not is_role(parts[index]) or (index and is_role(parts[index - 1])):
        return False
    is_end = index + 2 == len(parts)
    return not (is_end and parts[index + 1] in _OWN and parts[index] in _MODULES)


def is_role(part: str) -> bool:
    """Whether a part of a name is an attribute that PEFT gives to an adapted layer."""
    return part in ROLES


def without_adapter(name: str, adapter: str) -> str:
    """The name that PEFT saves: without the adapter's,
    at the end or before the last part.

    Source: ``_remove_adapter_name_from_state_dict_key`` in ``tuners/tuners_utils.py``.
    """
    if name.endswith(f".{adapter}"):
        return name.removesuffix(f".{adapter}")
    head, dot, leaf = name.rpartition(".")
    return f"{head.removesuffix(f'.{adapter}')}{dot}{leaf}"


def adapters(names: Iterable[str]) -> dict[str, list[ParsedName]]:
    """The parameters of each adapter,
    in the order of ``names``; empty where there is none."""
    all_names = list(names)
    groups: dict[str, list[ParsedName]] = {}
    text = "\n".join(all_names)
    if not any(hint in text for hint in _HINTS):  # a model of 100,000 tensors without an adapter
        return groups

    for name in all_names:
        parameter = parsed(name)
        if parameter.adapter is not None:
            groups.setdefault(parameter.adapter, []).append(parameter)

    return groups


def _path(parts: Iterable[str]) -> str:
    return ".".join(parts)
