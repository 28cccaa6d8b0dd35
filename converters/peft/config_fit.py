"""The facts that tensors show of an adapter, and whether a configuration is theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from converters import words
from converters.peft import expected_layers, kinds, names, patterns
from converters.peft.config import AdapterConfig
from converters.peft.expected_layers import TrainedLayers
from converters.peft.names import ParsedName
from converters.tensors import TensorRef

_B = ("lora_B",)
_A = ("lora_A", "lora_embedding_A")
_PROMPT_NETWORKS = {"mlp_head": "P_TUNING", "lstm_head": "P_TUNING", "transform": "PREFIX_TUNING"}
_MOST_MODULES = 2000  # that are compared with a pattern


@dataclass(frozen=True, slots=True)
class Shown:
    """The facts that the tensors of one adapter show without a configuration.

    ``peft_type`` is ``None`` where names do not tell (a prompt may be of several kinds).
    ``ranks`` maps LoRA's modules, named as in the base model, to the rank of their
    factors. ``modules`` are all adapted modules, ``saved`` those that are trained whole;
    ``trained`` has what else there is.
    """

    peft_type: str | None
    ranks: Mapping[str, int]
    modules: tuple[str, ...]
    saved: tuple[str, ...]
    dora: bool
    prompt: bool
    trained: TrainedLayers

    @property
    def title(self) -> str:
        """Kind and rank for people, such as ``LoRA adapter, r=16``."""
        kind = kinds.title(self.peft_type) if self.peft_type else "PEFT"
        if self.prompt:
            return "trained prompt" if self.peft_type is None else kind
        kind = f"{kind} (DoRA)" if self.dora else kind
        return f"{kind} adapter" + (f", r={_range(self.ranks.values())}" if self.ranks else "")

    @property
    def targets(self) -> str:
        """The last parts of the adapted modules' names, for people."""
        return words.some(
            sorted({module.rpartition(".")[2] for module in self.modules}), words.LONG_LIST
        )


def untouched(parameter_names: Iterable[str]) -> frozenset[str]:
    """The modules that no adapter touches, of the names of a PEFT model's parameters."""
    return frozenset(
        parameter.module
        for parameter in map(names.parsed, parameter_names)
        if parameter.role == names.BASE
    )


def shown(
    parameters: Iterable[ParsedName],
    tensors: Mapping[str, TensorRef],
    unadapted: frozenset[str] = frozenset(),
) -> Shown:
    """The facts that the parameters of one adapter show;
    ``tensors`` are by their whole names.

    ``unadapted`` are the modules that no adapter touches.
    """
    ranks: dict[str, int] = {}
    modules: dict[str, None] = {}
    saved: dict[str, None] = {}
    tokens: dict[str, int | None] = {}
    biased = False
    roles = set()
    network = None

    for parameter in parameters:
        roles.add(parameter.role)
        if parameter.role == names.PROMPT:
            network = network or _PROMPT_NETWORKS.get(parameter.rest.partition(".")[0])
        elif parameter.role == names.SAVED:
            saved[parameter.module] = None
        elif _adapted(parameter):
            modules[parameter.module] = None

        if parameter.role == names.TOKENS:
            tensor = tensors.get(parameter.name)
            shape = () if tensor is None else tensor.shape
            tokens[parameter.module] = shape[0] if shape else None

        biased = biased or (parameter.role in _B and parameter.rest == "bias")
        if parameter.role in _A and parameter.name in tensors:
            shape = tensors[parameter.name].shape
            if shape:
                ranks[parameter.module] = shape[0]

    prompt = names.PROMPT in roles
    kind = network if prompt else kinds.by_roles(roles)
    dora = "lora_magnitude_vector" in roles
    trained = TrainedLayers(
        tuple(modules),
        tuple(saved),
        tuple(tokens.items()),
        biased,
        unadapted,
    )

    return Shown(kind, ranks, tuple(modules), tuple(saved), dora, prompt, trained)


def _adapted(parameter: ParsedName) -> bool:
    """Whether a parameter belongs to the adapter
    of a layer (rows of embeddings are another's)."""
    of_layer = names.is_role(parameter.role) and parameter.module != ""
    return of_layer and not parameter.of_tokens


def misfit(config: AdapterConfig, adapter: Shown) -> str | None:
    """Why a configuration is not that of the tensors:
    what it says, what they are; else ``None``.

    ``CheckpointError`` for a pattern of the configuration that is not read.
    """
    kind = kinds.title(config.peft_type)
    if config.prompt != adapter.prompt or (
        adapter.peft_type and adapter.peft_type != config.peft_type
    ):
        return f"it is of {kind}, the tensors are of {words.with_article(adapter.title)}"
    if config.prompt:
        return None
    if config.peft_type == "LORA" and config.use_dora != adapter.dora:
        word, count = ("with", "none") if config.use_dora else ("without", "some")
        return f"it is {word} DoRA (use_dora), and the tensors have {count} of its magnitudes"

    return (
        _rank_misfit(config, adapter)
        or _target_misfit(config, adapter)
        or _saved_misfit(config, adapter)
        or expected_layers.without_tensors(config, adapter.trained)
        or expected_layers.unscaled(config, adapter.trained)
    )


def _rank_misfit(config: AdapterConfig, adapter: Shown) -> str | None:
    if config.peft_type not in ("LORA", "ADALORA"):
        return None

    stacked = config.values.get("target_parameters")  # experts' factors lie on one another
    for module, rank in adapter.ranks.items():
        expected = config.rank(module) if config.peft_type == "LORA" else config.r
        if type(expected) is not int or expected == rank:
            continue
        if stacked and expected and rank % expected == 0:
            continue
        return f"it says rank {expected} for {module}, whose tensors have rank {rank}"

    return None


def _target_misfit(config: AdapterConfig, adapter: Shown) -> str | None:
    targets = config.target_modules
    if targets is None:
        return None
    if config.values.get("target_parameters") or config.peft_type == "TRAINABLE_TOKENS":
        return None

    for module in adapter.modules[:_MOST_MODULES]:
        if targets == "all-linear" or is_target(targets, module):
            if (exclusion := expected_layers.left_out(config, module)) is not None:
                return f"{exclusion} {module}, which the tensors adapt"
            continue
        text = targets if isinstance(targets, str) else words.some(sorted(targets), words.LONG_LIST)
        return f"its target_modules are {text}, and the tensors adapt {module}"

    return None


def is_target(targets: tuple[str, ...] | str, module: str) -> bool:
    """Whether a module, named as in the base model,
    is one of the targets, by PEFT's rule."""
    if isinstance(targets, str):
        return patterns.matches(targets, module)
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _saved_misfit(config: AdapterConfig, adapter: Shown) -> str | None:
    if config.values.get("ensure_weight_tying"):
        return None

    for module in adapter.saved:
        if not module.endswith(config.modules_to_save):  # PEFT wants no dot before
            text = words.some(sorted(config.modules_to_save), words.LONG_LIST) or "none"
            return f"its modules_to_save are {text}, and the tensors have a trained {module}"

    return None


def _range(ranks: Collection[int]) -> str:
    lowest, highest = min(ranks), max(ranks)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"
