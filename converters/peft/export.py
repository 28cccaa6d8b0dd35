"""The tensors that PEFT saves of an adapter, and their names.

Names are all that is looked at, so the same function serves a checkpoint and a live
model. PEFT walks the model's modules instead; that both come to the same is tested
against PEFT for each kind. Source: PEFT 0.21.2 ``get_peft_model_state_dict`` and the
tuners' ``_get_adapter_state_dict``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from converters.errors import CheckpointError
from converters.options import NAMES
from converters.peft import embeddings, names
from converters.peft.config import AdapterConfig
from converters.peft.kinds import KINDS, title
from converters.peft.names import ParsedName, parsed

PROMPT_EMBEDDINGS = "prompt_embeddings"
_SHARED = {  # of the whole adapter, not of a layer: saved where the configuration says
    "VERA": ("vera_A", "vera_B"),
    "PVERA": ("pvera_A", "pvera_B"),
    "VBLORA": ("vblora_vector_bank",),
}
_LISTS = ("peanut_encoders", "peanut_decoders")  # of modules, below the adapter's name
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


@dataclass(frozen=True, slots=True)
class Selection:
    """The tensors that are saved of an adapter: PEFT's names, and those in the model.

    ``masks`` has the ranks that AdaLoRA keeps of a tensor, by the name that PEFT gives
    it: rows of ``lora_A`` and ``lora_E``, columns of ``lora_B``. ``prompt`` are the
    parameters, by the end of their names, that ``prompt_embeddings`` is computed of;
    empty where it is a plain tensor. ``embeddings`` are the names of embeddings that are
    saved whole beside the adapter.
    """

    sources: Mapping[str, str]
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    prompt: Mapping[str, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()


def selection(
    all_names: Iterable[str],
    config: AdapterConfig,
    adapter: str = "default",
    *,
    tied: Collection[str] = (),
    resized: bool = False,
) -> Selection:
    """The tensors that PEFT saves of ``adapter``; ``all_names`` are the names of a PEFT
    model's state dict.

    ``tied`` are those of them that share the values of an earlier one. ``resized`` says
    that the vocabulary is not the base model's any more: then the embeddings are saved
    whole. ``CheckpointError`` (unsupported) for a kind that is not read.
    """
    require_supported(config)
    name_list = list(all_names)
    others = frozenset(name for name in names.adapters(name_list) if name != adapter)
    parameters = [
        parsed(name) for name in name_list if config.prompt or not _of_another(name, others)
    ]

    computed: dict[str, str] = {}
    if config.prompt:
        saved, computed = _prompt(parameters, config, adapter)
    else:
        saved = dict(_layers(parameters, config, adapter))

    saved |= dict(_saved_modules(parameters, adapter, tied))

    whole_embeddings = dict(embeddings.saved(parameters, config, resized))
    saved |= whole_embeddings

    sources = {_final(saved_name): name for saved_name, name in saved.items()}
    masks = _masks(config, sources) if config.peft_type == "ADALORA" else {}

    return Selection(sources, masks, computed, frozenset(whole_embeddings))


def require_supported(config: AdapterConfig) -> None:
    """``CheckpointError`` (unsupported) for a kind
    of adapter whose rules are not known here."""
    compact = config.values.get("save_only_topk_weights") is True  # VB-LoRA: computed
    if compact or config.peft_type not in (_PROMPTS if config.prompt else KINDS):
        raise CheckpointError(
            f"{config.path}: adapters of the kind {title(config.peft_type)} are not "
            f"written yet; {NAMES('as-stored')} writes the tensors under the names of the "
            "checkpoint",
            "unsupported",
        )


def _of_another(name: str, others: frozenset[str]) -> bool:
    """Whether a name belongs to another adapter,
    by PEFT's rule: any part of it is the other's."""
    return not others.isdisjoint(name.split(".")[1:])


def _layers(
    parameters: Iterable[ParsedName], config: AdapterConfig, adapter: str
) -> Iterator[tuple[str, str]]:
    """The tensors of adapted layers, and the biases that are trained with them."""
    shared = _SHARED.get(config.peft_type, ())
    adapted = set()
    for parameter in parameters:
        name, role = parameter.name, parameter.role
        if not names.is_role(role) or parameter.adapter != adapter:
            continue
        if parameter.of_tokens or role == "ranknum":
            continue
        if role in shared and (parameter.module or not config.save_projection):
            continue

        adapted.add((parameter.prefix, parameter.module))
        if role in _LISTS:
            yield name.replace(f".{role}.{adapter}.", f".{role}.", 1), name
        else:
            yield names.without_adapter(_dora(name) if config.use_dora else name, adapter), name

    if config.bias == "none":
        return

    for parameter in parameters:
        name = parameter.name
        of_layer = parameter.role == names.BASE_LAYER and parameter.rest == "bias"
        of_target = of_layer and (parameter.prefix, parameter.module) in adapted
        if of_target or (config.bias == "all" and (name == "bias" or name.endswith(".bias"))):
            yield name, name


def _dora(name: str) -> str:
    """DoRA's magnitudes are saved
    as they were named before they got a module of their own."""
    weight = parsed(name).role == "lora_magnitude_vector" and name.endswith(".weight")
    return name.removesuffix(".weight") if weight else name


def _saved_modules(
    parameters: Iterable[ParsedName], adapter: str, tied: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Modules that are trained whole,
    and trained rows of embeddings: of tied ones the first's."""
    for parameter in parameters:
        if parameter.adapter != adapter:
            continue
        if parameter.role == names.SAVED:
            yield f"{parameter.prefix}{parameter.module}.{parameter.rest}", parameter.name
        elif parameter.of_tokens and parameter.name not in tied:
            yield names.without_adapter(parameter.name, adapter), parameter.name


def _prompt(
    parameters: Iterable[ParsedName], config: AdapterConfig, adapter: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The tensors of a prompt encoder, and those that the prompt is computed of."""
    encoder = {
        parameter.rest: parameter.name
        for parameter in parameters
        if parameter.role == names.PROMPT and parameter.adapter == adapter
    }

    prompt_embedding = encoder.get("embedding.weight")
    if prompt_embedding is None:
        raise CheckpointError(
            f"the checkpoint has no {names.PROMPT}.{adapter}.embedding.weight, which "
            f"{title(config.peft_type)} trains",
            "incomplete",
        )

    saved = {PROMPT_EMBEDDINGS: prompt_embedding}
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        extra = ("prefix_task_cols", "prefix_task_rows")
        saved = {name: encoder[name] for name in extra if name in encoder} | saved

    computed = config.peft_type in ("P_TUNING", "PREFIX_TUNING") and len(encoder) > 1
    return saved, encoder if computed else {}


def _masks(
    config: AdapterConfig,
    sources: Mapping[str, str],
) -> dict[str, tuple[bool, ...]]:
    """The ranks that AdaLoRA's budget leaves, by the name that PEFT saves."""
    masks = {}
    for name, ranks in config.rank_pattern.items():
        if not isinstance(ranks, list) or not all(isinstance(rank, bool) for rank in ranks):
            raise CheckpointError(f"{config.path}: rank_pattern of {name}: expected true or false")
        module = name.replace(".lora_E", "").removesuffix(".default")
        for role in ("lora_A", "lora_B", "lora_E"):
            saved = f"{names.MODEL}{module}.{role}"
            if saved in sources:
                masks[saved] = tuple(ranks)

    return masks


def _final(name: str) -> str:
    """The name with PEFT's prefix,
    which a model has that was given an adapter without PeftModel.

    Source: transformers 5.23 ``save_pretrained`` of a model with
    ``_hf_peft_config_loaded``. What a model that holds the PEFT model as a part puts
    before it is taken off.
    """
    if "." not in name:
        return name

    prefix = parsed(name).prefix
    if not prefix:
        return names.MODEL + name

    head = names.MODEL if prefix.endswith(names.MODEL) else names.WRAPPER
    return head + name[len(prefix) :]
