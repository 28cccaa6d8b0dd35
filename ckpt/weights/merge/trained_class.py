"""The class of the trained model, where the base was saved as another class.

A classifier is trained on the files of a model with a head that generates, or with
none. That head is not part of the trained model, and a pooler of the trained model may
be in no file of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt.weights.adapters.base_model import Loaded
from ckpt.weights.companions import model_folder
from ckpt.weights.reader import table
from converters.lazy_pattern import LazyPattern
from converters.peft.config import AdapterConfig
from converters.tensors import Weights

HEADS = {  # the end of an architecture's name, by PEFT's task_type
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_END = LazyPattern(r"(LMHeadModel|For[A-Z]\w*|Model)$")


def task_of(adapters: Iterable[AdapterConfig]) -> str | None:
    """The task by which a head was trained, if PEFT was told one."""
    return next((adapter.task_type for adapter in adapters if adapter.task_type in HEADS), None)


def architecture(
    config: Mapping[str, Any] | None,
    adapters: Iterable[AdapterConfig],
    names: Collection[str],
) -> str | None:
    """The class of the trained model.

    ``names`` are those in the checkpoint, as the model has them. The class is that of
    the task, else the one that config.json names. If that one does not know all the
    names, it is the class that PEFT notes where no task says it (0.21.2,
    ``auto_mapping``).
    """
    stated = model_folder.architecture(config or {})
    all_adapters = list(adapters)
    task = task_of(all_adapters)
    if stated is None or task is not None:
        return stated if stated is None or task is None else _with_head(stated, HEADS[task])

    reader = table.reader_of(stated)
    if reader is None or all(map(reader.knows, names)):
        return stated

    for noted_name in filter(None, map(_noted, all_adapters)):
        noted_reader = table.reader_of(noted_name)
        if (
            noted_reader is not None
            and noted_reader.type == reader.type
            and all(map(noted_reader.knows, names))
        ):
            return noted_name

    return stated


def _with_head(name: str, end: str) -> str:
    return name if name.endswith(end) else _END.sub("", name) + end


def _noted(config: AdapterConfig) -> str | None:
    auto_mapping = config.values.get("auto_mapping")
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    return name if isinstance(name, str) else None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A base's weights as far as the trained class has them.

    ``surplus`` are the names of the others.

    ``of_other_class`` says that the base was saved as another class.
    """

    weights: Weights
    surplus: tuple[str, ...] = ()
    of_other_class: bool = False


def fitted(base: Loaded, name: str | None, names: Collection[str]) -> Fitted:
    """The base's weights that a class has; ``names`` are those in the checkpoint.

    Nothing is left out of a base that was saved as the same class, or where the class
    is unknown.
    """
    weights = base.weights
    if name is None or name == base.architecture:
        return Fitted(weights)

    reader = table.reader_of(name)
    if reader is None:
        # a head is tied, if anything
        return Fitted(replace(weights, aliases={}), of_other_class=True)

    trained_names = {*names}
    surplus = [
        name for name in weights.tensors if name not in trained_names and not reader.knows(name)
    ]
    surplus_names = frozenset(surplus)
    tensors = {name: ref for name, ref in weights.tensors.items() if name not in surplus_names}
    aliases = {
        alias: owner
        for alias, owner in weights.aliases.items()
        if owner not in surplus_names and (alias in trained_names or reader.knows(alias))
    }

    return Fitted(replace(weights, tensors=tensors, aliases=aliases), tuple(surplus), True)
