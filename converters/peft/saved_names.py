"""The names of an adapter's parameters, where they were saved as PEFT saves them.

    in the training     ...q_proj.lora_A.default.weight     score.modules_to_save.default.weight
    saved               ...q_proj.lora_A.weight             score.weight

Accelerate saves FSDP's shards of a PEFT model so (``adapter_only``), and the optimizer's
state under the names of the training. Where no optimizer says it, the adapter is PEFT's
"default".

Source: accelerate 1.15 ``utils/fsdp_utils.py`` (``_get_model_state_dict``), PEFT 0.21.2
``utils/save_and_load.py`` (``get_peft_model_state_dict``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converters.peft import names as peft_names

_DEFAULT = "default"


def are_saved(names: Collection[str]) -> bool:
    """Whether names are a PEFT model's, and none has the adapter's name in it."""
    if not names or not all(name.startswith(peft_names.WRAPPER) for name in names):
        return False
    return not peft_names.adapters(names)


def restored(names: Collection[str], trained: Collection[str]) -> Mapping[str, str]:
    """The names of the training by those that were saved;
    ``trained`` are the optimizer's."""
    by_saved_name = {saved: name for name in trained for saved in _saved_names(name)}
    return {name: by_saved_name.get(name) or _with_default(name) for name in names}


def _saved_names(name: str) -> list[str]:
    """The names that PEFT may save a parameter under."""
    parameter = peft_names.parsed(name)
    if parameter.adapter is None:
        return []
    if parameter.role == peft_names.SAVED:
        return [f"{parameter.prefix}{parameter.module}.{parameter.rest}"]
    return [peft_names.without_adapter(name, parameter.adapter)]


def _with_default(name: str) -> str:
    """The name with the adapter's in it, where it is that of an adapter's parameter."""
    head, _, leaf = name.rpartition(".")
    for candidate in (f"{head}.{_DEFAULT}.{leaf}", f"{name}.{_DEFAULT}"):
        if peft_names.parsed(candidate).adapter == _DEFAULT:
            return candidate
    return name
