"""Embeddings that PEFT saves whole beside an adapter:
where they are adapted, or were resized.

Source: PEFT 0.21.2 ``get_peft_model_state_dict`` with ``save_embedding_layers="auto"``.
PEFT asks the model for its input and output embeddings; a checkpoint has only their
names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from converters.peft import names, patterns
from converters.peft.config import AdapterConfig
from converters.peft.names import ParsedName

TARGETS = ("embed_tokens", "lm_head")  # EMBEDDING_LAYER_NAMES
ALL_LINEAR = "all-linear"
INPUTS = (  # what transformers' models call their input embedding; the first that is there
    *("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"),
    *("word_embedding", "token_embedding", "tokens_embed", "input_embedding", "transformer.w"),
    *("embeddings", "embedding"),
)
OUTPUTS = (  # and their output embedding
    *("lm_head.decoder", "lm_head.out_proj", "lm_head", "embed_out", "output_projection"),
    *("proj_out", "generator_lm_head", "vocab_projector", "pred_layer.proj", "lm_loss"),
    *("output", "predictions.decoder", "decoder"),
)


def saved(
    parameters: Iterable[ParsedName], config: AdapterConfig, resized: bool
) -> Iterator[tuple[str, str]]:
    """The embeddings' tensors that are saved whole: the names in the file, and here."""
    all_parameters = list(parameters)
    adapted = targeted(all_parameters, config) and not _tokens(config)
    if not adapted and not resized:
        return

    for layer in layers(all_parameters):
        prefix = f"{layer}.{names.BASE_LAYER}." if adapted else f"{layer}."
        for parameter in all_parameters:
            name = parameter.name
            if name.startswith(prefix):
                adapter = parameter.adapter
                yield (names.without_adapter(name, adapter) if adapter else name), name


def _tokens(config: AdapterConfig) -> bool:
    """Whether rows of embeddings are trained;
    then the embeddings are not saved whole."""
    rows = config.values.get("trainable_token_indices") is not None
    return rows or config.peft_type == "TRAINABLE_TOKENS"


def targeted(parameters: Iterable[ParsedName], config: AdapterConfig) -> bool:
    """Whether the configuration's targets are embeddings, by PEFT's rule."""
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in TARGETS)

    modules = {parameter.module for parameter in parameters}
    return any(
        patterns.matches(targets, module)
        for module in modules
        if module.rpartition(".")[2] in TARGETS
    )


def layers(parameters: Iterable[ParsedName]) -> tuple[str, ...]:
    """The model's input and output embedding,
    as far as names tell, with PEFT's prefix."""
    all_parameters = list(parameters)
    pair = (_layer(all_parameters, candidates) for candidates in (INPUTS, OUTPUTS))
    return tuple(dict.fromkeys(layer for layer in pair if layer is not None))


def _layer(parameters: Iterable[ParsedName], candidates: Iterable[str]) -> str | None:
    """The first of some modules that is there; the least deep of several of one name.

    Modules within numbered layers are left out.
    """
    modules = {
        parameter.module: parameter.prefix + parameter.module
        for parameter in parameters
        if parameter.role != names.PROMPT and parameter.module
    }

    outer = [module for module in modules if not any(map(str.isdigit, module.split(".")))]
    outer.sort(key=lambda module: module.count("."))
    ends = (f".{name}" for name in candidates)

    return next(
        (modules[module] for ending in ends for module in outer if f".{module}".endswith(ending)),
        None,
    )


def inputs(all_names: Iterable[str]) -> str | None:
    """The one name among a model's that is called
    as the weights of input embeddings are.

    ``None`` where there is none, or several of the same kind.
    """
    dotted_names = [f".{name}" for name in all_names]
    for candidate in INPUTS:
        matching = [name for name in dotted_names if name.endswith(f".{candidate}.weight")]
        if matching:
            return matching[0][1:] if len(matching) == 1 else None

    return None


def rows(parameters: Iterable[ParsedName]) -> str | None:
    """The name of the tensor whose first axis is the vocabulary, if one is there.

    That may be the trained copy of an embedding whose original is not in the checkpoint.
    """
    all_parameters = list(parameters)
    for layer in layers(all_parameters)[:1]:
        vocabulary_tensors = [
            parameter
            for parameter in all_parameters
            if parameter.rest == "weight"
            and (parameter.adapter is None or parameter.role == names.SAVED)
            and parameter.prefix + parameter.module == layer
        ]

        vocabulary_tensors.sort(key=lambda parameter: parameter.adapter is not None)
        return vocabulary_tensors[0].name if vocabulary_tensors else None

    return None
