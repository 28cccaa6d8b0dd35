"""The changes that an adapter makes to the tensors of a layer, chosen by kind."""

from __future__ import annotations

from collections.abc import Callable

from converters.errors import CheckpointError
from converters.options import BASE, MERGE
from converters.peft import kinds
from converters.peft.config import AdapterConfig
from converters.peft.merge.lora_changes import CHAT, ada, chat, embedding, lora
from converters.peft.merge.other_changes import ia3, loha, lokr, otherwise, tokens, vera
from converters.peft.merge.sites import Changed, Parts, Site
from converters.peft.names import TOKENS

_TITLES = ("LoRA", "AdaLoRA", "LoHa", "LoKr", "IA3", "VeRA", "LayerNorm tuning", "trained tokens")
_VARIANTS = {  # fields of a LoRA configuration that make something else of it
    "alora_invocation_tokens": "an activated LoRA, which acts behind some tokens only",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "megatron_config": "a LoRA of Megatron's layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "a LoRA of single parameters (experts that lie in one tensor; PEFT makes "
    "it of target_modules such as all-linear or gate, too)",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}


def require_mergeable(config: AdapterConfig) -> None:
    """``CheckpointError`` for a kind of adapter that is in no weight,
    or is not merged here."""
    title = kinds.title(config.peft_type)
    if config.prompt:
        raise CheckpointError(
            f"{title} trains what stands before the input, and changes no weight: there "
            f"is nothing to merge; without {MERGE} the adapter is written, for "
            "PeftModel.from_pretrained",
            "refused",
        )
    if title not in _TITLES:
        raise CheckpointError(f"{title} is not merged here; {otherwise()}", "unsupported")

    for name, variant in _VARIANTS.items():
        if config.values.get(name):
            text = f"{config.path}: {name} makes it {variant}, which is not merged here"
            raise CheckpointError(f"{text}; {otherwise()}", "unsupported")

    start = str(config.values.get("init_lora_weights") or "")
    if start == "mica":
        raise CheckpointError(f"MiCA is not merged here; {otherwise()}", "unsupported")


def alters_base(config: AdapterConfig) -> str | None:
    """The way of initialization by which training began with other base weights,
    if it did."""
    start = str(config.values.get("init_lora_weights") or "")
    alters = start.startswith(("pissa", "corda")) or start in ("olora", "loftq", "lora_ga")
    return start if alters else None


def require_fitting_base(config: AdapterConfig, place: str, has_own_base: bool) -> None:
    """``CheckpointError`` if training began
    with other weights than those of the base in ``place``.

    ``has_own_base`` says that the checkpoint has the weights that it began with.
    """
    start = alters_base(config)
    if start is None:
        return

    text = (
        f"{config.path}: init_lora_weights is {start}, which changed the base's "
        f"weights before the training: the adapter does not fit those of {place}; "
    )
    if has_own_base:
        raise CheckpointError(
            text + f"merge into the copy in the checkpoint, without {BASE}", "refused"
        )

    raise CheckpointError(
        text + "the changed ones are not in the checkpoint, which has only what was trained; "
        f"leave {MERGE} out to write the adapter; PEFT makes a plain LoRA of it with the "
        "adapter as it was before the training (save_pretrained, "
        "path_initial_model_for_weight_conversion)",
        "refused",
    )


def of_layer(site: Site, parts: Parts, shared: Parts, config: AdapterConfig) -> Changed:
    """The changes that an adapter makes to a layer. ``CheckpointError`` for parts that
    do not fit."""
    roles = {role for role, _ in parts}
    changes = _changes(site, parts, shared, config)
    unknown = sorted(roles - _known(config))
    if unknown or not changes:
        name = unknown[0] if unknown else sorted(roles)[0]
        raise site.fail(
            f"{name} is not a part of {kinds.title(config.peft_type)} that is known here"
        )
    return changes


def _known(config: AdapterConfig) -> set[str]:
    known_roles = {*kinds.KINDS[config.peft_type].roles, TOKENS}
    if config.peft_type == "LORA":
        known_roles |= set(CHAT)
    if config.peft_type == "ADALORA":
        known_roles |= set(kinds.KINDS["LORA"].roles)
    return known_roles


def _changes(site: Site, parts: Parts, shared: Parts, config: AdapterConfig) -> Changed:
    roles = {role for role, _ in parts}
    if CHAT[0] in roles:
        return chat(site, parts, config)
    if "lora_A" in roles or "lora_B" in roles:
        return ada(site, parts, config) if "lora_E" in roles else lora(site, parts, config)
    if "lora_embedding_A" in roles:
        return embedding(site, parts, config)

    by_role: dict[str, Callable[[Site, Parts, Parts, AdapterConfig], Changed]] = {
        "ia3_l": ia3,
        "vera_lambda_b": vera,
        TOKENS: tokens,
    }

    for role, choose_change in by_role.items():
        if role in roles:
            return choose_change(site, parts, shared, config)

    if any(role.startswith("hada_") for role in roles):
        return loha(site, parts, config)
    if any(role.startswith("lokr_") for role in roles):
        return lokr(site, parts, config)

    return {}
