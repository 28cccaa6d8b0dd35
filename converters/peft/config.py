"""``adapter_config.json``: what PEFT knows of an adapter and no tensor says.

Read as data, with bounds: nothing that the file names is imported or opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Literal

from converters.detect import filenames
from converters.errors import CheckpointError
from converters.peft import patterns
from converters.storage import bounded_json, stores

NAME = filenames.ADAPTER_CONFIG
MAX_CONFIG_BYTES = 16 << 20  # bytes; indices of trained tokens are the only long list in it
INPUT_EMBEDDING = ""  # the key of token indices that name no layer
PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
)
Targets = tuple[str, ...] | str | None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """One adapter's configuration.

    ``values`` is the whole file, ``path`` where it was read. ``r`` and ``lora_alpha``
    are the rank and the numerator of the scaling of layers that no pattern names; the
    patterns map regular expressions of module names to others. ``target_modules`` are
    names or the ends of names, a regular expression (``str``), or ``None`` where PEFT
    chose by the model's type. ``token_indices`` maps the layers that have trained rows
    to the rows; the key ``INPUT_EMBEDDING`` is the model's input embedding. ``bias`` is
    ``none``, ``all`` or, such as ``lora_only``, that of the targets.
    """

    peft_type: str
    values: Mapping[str, Any]
    path: Path | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_modules: Targets = None
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    save_projection: bool = True

    @property
    def prompt(self) -> bool:
        """Whether the adapter trains a prompt before the input,
        and no layer of the model."""
        return self.peft_type in PROMPTS

    def alpha(self, module: str) -> float | None:
        """``lora_alpha`` of a module, named as in the base model."""
        alpha: float | None = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha

    def rank(self, module: str) -> Any:
        """The rank configured for a module, named as in the base model."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """The factor that B @ A of a LoRA module of ``rank`` is multiplied by.

        ``CheckpointError`` where the configuration has no ``lora_alpha``.
        """
        alpha = self.alpha(module)
        if alpha is None:
            raise CheckpointError(f"{self.path} has no lora_alpha, which scales the adapter")
        return alpha / sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the name, its end after a dot,
    or a pattern of these."""
    for key, value in pattern.items():
        if patterns.ends_with(key, module):
            return value
    return default


def read(path: Path) -> AdapterConfig:
    """The configuration in a file,
    or in a folder's file of the name; ``CheckpointError``."""
    path = path / NAME if stores.is_folder(path) else path
    try:
        size = stores.regular_size(path)
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes, expected at most {MAX_CONFIG_BYTES}", "refused"
            )
        data = stores.content(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error

    try:
        values = bounded_json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is not an adapter configuration: {error}") from error

    return parse(values, path)


def parse(values: Any, path: Path | None = None) -> AdapterConfig:
    """The configuration in the object that the file holds; ``CheckpointError``."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not an adapter configuration: expected an object")

    fields = _Fields(values, path)
    return AdapterConfig(
        peft_type=fields.text("peft_type", required=True) or "",
        values=values,
        path=path,
        task_type=fields.text("task_type"),
        base_model_name_or_path=fields.text("base_model_name_or_path"),
        r=fields.rank(),
        lora_alpha=fields.number("lora_alpha", "alpha"),
        rank_pattern=fields.mapping("rank_pattern"),
        alpha_pattern=fields.numbers("alpha_pattern"),
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        bias=fields.text("bias") or "none",
        target_modules=fields.targets(),
        modules_to_save=fields.names("modules_to_save"),
        token_indices=fields.tokens(),
        save_projection=fields.flag("save_projection", default=True),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a configuration, each of the type that PEFT gives it."""

    values: Mapping[str, Any]
    path: Path | None

    def wrong(self, name: str, expected: str) -> CheckpointError:
        value = repr(self.values.get(name))
        return CheckpointError(f"{self.path}: {name} is {value[:80]}, expected {expected}")

    def text(self, name: str, required: bool = False) -> str | None:
        value = self.values.get(name)
        if value is None and not required:
            return None
        if not isinstance(value, str) or len(value) > 4096:
            raise self.wrong(name, "a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return default if value is None else value

    def rank(self) -> int | None:
        """``r``; of AdaLoRA the one that training begins with."""
        adaptive = self.values.get("peft_type") == "ADALORA"
        name = "init_r" if adaptive else "r"
        value = self.values.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
            raise self.wrong(name, "a whole number")
        return value

    def number(self, *names: str) -> float | None:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not _number(value):
                raise self.wrong(name, "a number")
            return value  # type: ignore[no-any-return]

        return None

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value or {}

    def numbers(self, name: str) -> Mapping[str, float]:
        value = self.mapping(name)
        if not all(map(_number, value.values())):
            raise self.wrong(name, "numbers")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        value = [value] if isinstance(value, str) else value
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            raise self.wrong(name, "names")
        return tuple(value)

    def targets(self) -> Targets:
        value = self.values.get("target_modules")
        return value if isinstance(value, str) else self.names("target_modules") or None

    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        name: Literal["trainable_token_indices", "token_indices"] = "trainable_token_indices"
        if self.values.get("peft_type") == "TRAINABLE_TOKENS":
            name = "token_indices"

        value = self.values.get(name)
        if value is None:
            return {}

        layers = value if isinstance(value, dict) else {INPUT_EMBEDDING: value}
        for rows in layers.values():
            if not isinstance(rows, list) or any(type(row) is not int for row in rows):
                raise self.wrong(name, "numbers of tokens")

        return {layer: tuple(rows) for layer, rows in layers.items()}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and isfinite(value)
