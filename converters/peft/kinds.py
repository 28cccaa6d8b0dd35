"""The kinds of adapters, and the names of the parameters by which each is known.

Source: the ``prefix`` and ``adapter_layer_names`` of PEFT 0.21.2's tuners.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class PeftKind(NamedTuple):
    """A kind of adapter: ``peft_type``, its title for people,
    and what its parameters are called.

    ``roles`` are the attributes of an adapted layer (or of the whole adapter, such as
    ``vera_A``) that hold tensors.
    """

    peft_type: str
    title: str
    roles: tuple[str, ...]


KINDS = {
    kind.peft_type: kind
    for kind in (
        PeftKind(
            "LORA",
            "LoRA",
            (
                *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
                *("lora_magnitude_vector", "lora_diag", "lora_arrow", "lora_velora_embed"),
                "lora_monteclora_sampler",
            ),
        ),
        PeftKind("ADALORA", "AdaLoRA", ("lora_E", "ranknum")),
        PeftKind("ADAMSS", "AdaMSS", ("adamss_A", "adamss_B", "adamss_newB")),
        PeftKind("BEFT", "BEFT", ("beft_bias",)),
        PeftKind("BOFT", "BOFT", ("boft_R", "boft_s")),
        PeftKind("C3A", "C3A", ("c3a_kernel",)),
        PeftKind("DEFT", "DEFT", ("deft_P", "deft_R")),
        PeftKind("DELORA", "DeLoRA", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
        PeftKind("FOURIERFT", "FourierFT", ("fourierft_spectrum",)),
        PeftKind("GLORA", "GLoRA", ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")),
        PeftKind(
            "GRALORA",
            "GraLoRA",
            ("gralora_A", "gralora_A_general", "gralora_B", "gralora_B_general"),
        ),
        PeftKind("HIRA", "HiRA", ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")),
        PeftKind("HRA", "HRA", ("hra_u",)),
        PeftKind("IA3", "IA3", ("ia3_l",)),
        PeftKind("LILY", "Lily", ("lily_A", "lily_B", "lily_router")),
        PeftKind("LN_TUNING", "LayerNorm tuning", ("ln_tuning_layers",)),
        PeftKind(
            "LOHA",
            "LoHa",
            ("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ),
        PeftKind(
            "LOKR",
            "LoKr",
            (
                *("lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
                *("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            ),
        ),
        PeftKind("MISS", "MiSS", ("miss_block",)),
        PeftKind("OFT", "OFT", ("oft_R", "oft_embedding_R")),
        PeftKind("OSF", "OSF", ("osf_svd_params",)),
        PeftKind(
            "PEANUT",
            "PEANuT",
            ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
        ),
        PeftKind("PSOFT", "PSOFT", ("psoft_R",)),
        PeftKind(
            "RANDLORA",
            "RandLoRA",
            ("randlora_gamma", "randlora_lambda", "randlora_A", "randlora_B"),
        ),
        PeftKind("ROAD", "RoAd", ("road_alpha", "road_theta")),
        PeftKind(
            "SUPERTUNING",
            "super tuning",
            (
                *("supertuning_values", "supertuning_indices"),
                *("supertuning_lora_A", "supertuning_lora_B"),
            ),
        ),
        PeftKind("TRAINABLE_TOKENS", "trained tokens", ("trainable_tokens_delta",)),
        PeftKind("POLY", "Poly", ("poly_lora_A", "poly_lora_B", "poly_router")),
        PeftKind("PVERA", "PVeRA", ("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B")),
        PeftKind("VBLORA", "VB-LoRA", ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")),
        PeftKind("VERA", "VeRA", ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")),
        PeftKind("WAVEFT", "WaveFT", ("waveft_spectrum",)),
    )
}
PROMPT_TITLES = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "CPT": "context-aware prompt tuning",
    "CARTRIDGE": "cartridge",
}
ROLES = {role: kind.peft_type for kind in KINDS.values() for role in kind.roles}


def title(peft_type: str) -> str:
    """A kind for people: LoRA of LORA; of one that is not known the name itself."""
    kind = KINDS.get(peft_type)
    return kind.title if kind else PROMPT_TITLES.get(peft_type, peft_type)


def by_roles(roles: Collection[str]) -> str | None:
    """The ``peft_type`` whose parameters these are; ``None`` if of none or of several.

    AdaLoRA has LoRA's and one of its own. Trained tokens are a part of other adapters
    too.
    """
    types = {ROLES[role] for role in roles if role in ROLES}
    if len(types) > 1:
        types -= {"TRAINABLE_TOKENS"}
    if types == {"LORA", "ADALORA"}:
        types = {"ADALORA"}
    return types.pop() if len(types) == 1 else None
