"""Models of the installed transformers, built without memory, to see which names they have.

Everything is built on the meta device from a configuration of the class itself, so nothing is
downloaded. ``Build`` is what one configuration gives; ``settings`` are fields of the configuration
by dotted path, such as ``text_config.num_hidden_layers``.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto import modeling_auto

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity(50)

Settings = Mapping[str, Any]
SECONDS = 90  # for one model
IGNORED = {  # fields that change no name
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript"),
    *("is_encoder_decoder", "use_return_dict", "tie_word_embeddings", "gradient_checkpointing"),
}

RESCUES: tuple[dict[str, Any], ...] = (  # where the defaults of a class fit no model
    {},
    {"head_dim": 64},
    {"text_config.head_dim": 64},
    {"num_key_value_heads": 8},
    {"vocab_size": 33, "pad_token_id": 1},
    {"prediction_length": 8},
    {"is_decoder": True},
    {"is_encoder_decoder": False},
    {"add_adapter": True},
    {"out_indices": [0, 1, 2, 3]},
    {"head_dim": 64, "num_key_value_heads": 8},
    {"vision_config.hidden_size": 1024, "vision_config.num_attention_heads": 16},
    {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 64},
    {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64},
    {"layer_types": ["conv", "full_attention"] * 4, "num_hidden_layers": 8},
    {"layer_types": ["full_attention", "sliding_attention"] * 4, "num_hidden_layers": 8},
    {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    {"num_heads": [2, 4], "depths": [1, 2], "image_size": 64},
)


# Fields that list the kinds of layers, or which layers are of a kind; and the kinds.
LAYER_KINDS = re.compile(
    r"layer_types|block_types?$|(layer|attn|moe).*(indices|idxs?|ids)$|_layers$"
)
KINDS = (*ALLOWED_LAYER_TYPES, "attention", "mamba", "mlp", "recurrent")
# Sizes of embeddings: a model has projections where they are unlike its own (OPT).
PROJECTED = re.compile(r"(emb|proj).*(dim|size)$|d_embed$")


@dataclass(frozen=True, slots=True)
class Build:
    """The names of one model: in memory, and as ``save_pretrained`` writes them (``hub``).

    Shapes are by name. ``tied`` are names, of both kinds, that take their values from others.
    """

    memory: Mapping[str, tuple[int, ...]]
    hub: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    model: Any = field(repr=False, compare=False, default=None)


def classes() -> dict[str, type]:
    """Every model class that an ``Auto...`` class of transformers may make, by name."""
    found: dict[str, type] = {}
    for mapping in sorted(vars(modeling_auto)):
        if not mapping.endswith("MAPPING_NAMES") or not mapping.startswith("MODEL_"):
            continue
        for entry in getattr(modeling_auto, mapping).values():
            for name in [entry] if isinstance(entry, str) else entry:
                with contextlib.suppress(ImportError):  # needs a library that is not installed
                    cls = getattr(transformers, name, None)
                    if name not in found and hasattr(cls, "config_class"):
                        found[name] = cls
    return found


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises ``TimeoutError`` after ``SECONDS``."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def configured(config_class: type, settings: Settings) -> Any:
    """A configuration of the class with some fields set; parts of it by ``part.field``."""
    arguments: dict[str, Any] = {}
    for path, value in settings.items():
        *parts, name = path.split(".")
        place, owner = arguments, config_class
        for part in parts:
            owner = getattr(owner, "sub_configs", {}).get(part)
            kind = getattr(owner, "model_type", None)
            place = place.setdefault(part, {"model_type": kind} if kind else {})
        place[name] = value
    return config_class(**arguments)


def build(cls: type, settings: Settings, hub: bool = True) -> Build:
    """The model of a class from its own configuration; whatever it raises for an unfit one."""
    return build_of(cls, configured(cls.config_class, settings), hub)


def build_of(cls: type, config: Any, hub: bool = True) -> Build:
    """The model of a class from a configuration; whatever it raises for an unfit one."""
    from transformers.initialization import no_init_weights  # not in 4

    with time_limit(), torch.device("meta"), no_init_weights():
        model = cls(config)
    state = {name: value for name, value in model.state_dict().items() if hasattr(value, "shape")}
    memory = {name: tuple(value.shape) for name, value in state.items()}
    tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
    if not hub:
        return Build(memory, memory, tied, model)
    try:
        with time_limit():
            stored = _reverted(model, state)
            untied = stored
            if tied:
                untied = _reverted(model, {n: v for n, v in state.items() if n not in tied})
    except Exception:
        return Build(memory, memory, tied, model)
    return Build(memory, stored, tied | (stored.keys() - untied.keys()), model)


def start(cls: type) -> tuple[Settings, Build]:
    """Settings with which a class can be built, and that build.

    They state what its configuration has by default and its parts alone would not, so that further
    settings of a part change nothing else.
    """
    problem: Exception | None = None
    for pins in dict.fromkeys((pinned(cls.config_class), ())):
        for settings in RESCUES:
            try:
                return (found := {**dict(pins), **settings}), build(cls, found)
            except Exception as error:
                problem = problem or error
    assert problem is not None
    raise problem


def pinned(config_class: type) -> tuple[tuple[str, Any], ...]:
    """The fields of parts that have another value than in the default of the part's own class.

    No lists: those depend on other fields.
    """
    own = own_defaults(config_class)
    unset = object()
    return tuple(
        (path, value)
        for path, value, _ in fields_of(config_class)
        if "." in path
        and (path.endswith(".model_type") or own.get(path, unset) != value)
        and (value is None or isinstance(value, (bool, int, float, str)))
        and not path.endswith((".transformers_version", "._name_or_path"))
    )


def parts_of(config: Any, prefix: str = "") -> dict[str, str]:
    """The types of the models inside a configuration, by the field that configures them."""
    found: dict[str, str] = {}
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if kind := getattr(part, "model_type", ""):
            found[prefix + name] = kind
            found |= parts_of(part, f"{prefix}{name}.")
    return found


def _reverted(model: Any, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that ``save_pretrained`` gives to a state."""
    from transformers.core_model_loading import revert_weight_conversion  # not in 4

    reverted = revert_weight_conversion(model, dict(state))
    return {name: tuple(value.shape) for name, value in reverted.items()}


def fields_of(config_class: type) -> Iterator[tuple[str, Any, Any]]:
    """(path, value by default, annotation) of each field, those of parts too."""
    with contextlib.suppress(Exception):
        yield from _fields(config_class(), "")


def own_defaults(config_class: type) -> dict[str, Any]:
    """The value that each field has where config.json states the part it is of, and not the field.

    Parts of another class than the whole would choose have no entry for what that adds.
    """
    with contextlib.suppress(Exception):
        return dict(_own_defaults(config_class(), ""))
    return {}


def _own_defaults(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for path, value, _ in _fields(type(config)(), prefix):
        if "." not in path.removeprefix(prefix):
            yield path, value
    for name, part in _parts(config):
        if prefix.count(".") < 2:
            yield from _own_defaults(part, f"{prefix}{name}.")


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    hints: dict[str, Any] = {}
    for base in reversed(type(config).__mro__):
        hints |= inspect.get_annotations(base)
    parts = dict(_parts(config))
    for name, value in config.to_dict().items():
        if name not in parts:
            yield prefix + name, value, hints.get(name)
    for name, part in parts.items():
        if prefix.count(".") < 2:
            yield from _fields(part, f"{prefix}{name}.")


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            yield name, part


def alternatives(path: str, value: Any, annotation: Any) -> list[Any]:
    """Other values of a field that may change which names a model has."""
    name = path.rpartition(".")[2]
    if name in IGNORED or name.endswith(("token_id", "_idx")) or "dropout" in name:
        return []
    kinds = typing.get_args(annotation) or (annotation,)
    if isinstance(value, bool):
        return [not value]
    if typing.get_origin(annotation) is typing.Literal:
        return [other for other in kinds if other != value]
    if value is None:
        return [True] if bool in kinds else [8] if int in kinds else []
    if isinstance(value, int):
        counted = ("dense_replace", "expert", "shared", "moe", "sparse", "every", "nextn", "mtp")
        others = [0, 1, 2] if any(word in name for word in counted) else []
        others += [value // 2] if PROJECTED.search(name) else []
        none = [None] if type(None) in kinds else []
        return [other for other in others if other != value] + none
    if isinstance(value, str) and type(None) in kinds and name != "name_or_path":
        return [None]
    return []


def kinds_of_layers(path: str, value: Any, annotation: Any) -> list[Any]:
    """Other values of a field that lists the kinds of layers, or the layers of one kind."""
    name = path.rpartition(".")[2]
    if not LAYER_KINDS.search(name):
        return []
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return [[kind] * len(value) for kind in KINDS]
    listed = any(typing.get_origin(k) is list or k is list for k in typing.get_args(annotation))
    if value is None and listed:
        return [[1], *([kind] * 2 for kind in KINDS)]
    numbers = isinstance(value, list) and value and all(type(each) is int for each in value)
    return [[1], [0]] if numbers else []
