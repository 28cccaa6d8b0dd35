"""The names of tensors: wrappers taken off, and what the user asks for.

Names change only where that is unambiguous: where a wrapper is known by its name, or
where one rule gives a reader that is known (``reader.audience``) just the names that it
wants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckpt.weights import parts
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.names import selection
from converters.names.rules import UNMISTAKABLE
from converters.options import NAMES, PART, RENAME, STRIP
from converters.tensors import Weights
from converters.words import counted, some

if TYPE_CHECKING:
    from ckpt.weights.reader.audience import Audience

# What wrappers put into names, wherever it stands; the last is of fairscale's FSDP.
WRAPPERS = (*UNMISTAKABLE, "_fpw_module")
_WRAPPER = LazyPattern(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
_DATA_PARALLEL = "module."  # DataParallel, DistributedDataParallel
_PEFT = "base_model.model."
# Parts of names that only adapters have (peft 0.21, tuners/*/layer.py).
_ADAPTED = LazyPattern(
    r"\.(?:lora_|ia3_|hada_|lokr_|vera_|oft_|boft_|hra_|base_layer|modules_to_save|original_module"
    r"|token_adapter|prompt_encoder|quant_state|absmax)"
)


@dataclass(frozen=True, slots=True)
class NamedWeights:
    """Weights under new names; ``renamed`` maps each new name to the old one."""

    weights: Weights
    renamed: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def with_names(self, names: Mapping[str, str], rule: str) -> NamedWeights:
        """The same with more names changed; ``names`` maps old to new."""
        changed = {old: new for old, new in names.items() if old != new}
        if not changed:
            return self

        weights = selection.renamed(self.weights, changed)
        all_names = frozenset(parts.every_name(self.weights))
        unchanged = {new: old for new, old in self.renamed.items() if new not in changed}
        origins = {
            new: self.renamed.get(old, old) for old, new in changed.items() if old in all_names
        }
        line = f"{rule} ({counted(len(origins), 'name')})"

        return replace(
            self, weights=weights, renamed=unchanged | origins, rules=(*self.rules, line)
        )

    def with_only(self, names: list[str]) -> NamedWeights:
        """Only the tensors of these names."""
        weights = selection.selected(self.weights, frozenset(names))
        remaining_names = frozenset(parts.every_name(weights))
        renamed = {new: old for new, old in self.renamed.items() if new in remaining_names}
        return replace(self, weights=weights, renamed=renamed)

    def with_note(self, note: str) -> NamedWeights:
        """The same with one more line for the user."""
        return replace(self, notes=(*self.notes, note))


def unwrapped(weights: Weights, audience: Audience | None = None) -> NamedWeights:
    """The weights without what wrappers put into names, such as ``module.``.

    A name that the reader knows as it is stays. All names stay where two of them would
    become one.
    """
    model = NamedWeights(weights)
    while True:
        owners = model.weights.lost_ties.values()
        names = list(dict.fromkeys((*parts.every_name(model.weights), *owners)))
        changes = {name: short for name in names if (short := _WRAPPER.sub("", name)) != name}
        rule = ", ".join(f"{word}." for word in WRAPPERS if any(word in name for name in changes))
        if not changes and _wrapped_whole(model.weights, names):
            changes = {name: name.removeprefix(_DATA_PARALLEL) for name in names}
            rule = _DATA_PARALLEL

        clear_names = [changes.get(name, name) for name in names]
        if not changes or len(set(clear_names)) < len(names) or _fit(audience, model.weights, {}):
            return _without_value_head(model, audience)

        model = model.with_names(changes, f"without {rule}")


def _without_value_head(model: NamedWeights, audience: Audience | None) -> NamedWeights:
    """The names as trl saves them: those of the model, and ``v_head.`` beside."""
    model_names = parts.value_head(model.weights)
    if not model_names or _fit(audience, model.weights, {}):
        return model

    is_alone = len(model_names) == len(parts.every_name(model.weights))
    bare_model = model.with_names(model_names, f"without {parts.PRETRAINED}")
    return bare_model if is_alone else bare_model.with_note(VALUE_HEAD_NOTE)


def _wrapped_whole(weights: Weights, names: list[str]) -> bool:
    """Whether every parameter's name begins with ``module.``, as a wrapper leaves it."""
    parameters = [name for name in names if weights.aliases.get(name, name) not in weights.buffers]
    return bool(parameters) and all(name.startswith(_DATA_PARALLEL) for name in parameters)


def like(weights: Weights, targets: Collection[str]) -> Weights:
    """The weights under the names of a model, which may be wrapped in another way.

    ``targets`` are the model's names. A name that is not a target becomes the one
    target that is the same without wrappers; all others stay.
    """
    names = parts.every_name(weights)
    if all(name in targets for name in names):
        return weights

    clear_names = _clear(targets)
    targets_by_clear_name = {short: target for target, short in clear_names.items()}
    if len(targets_by_clear_name) < len(clear_names):
        return weights  # two names of the model differ by a wrapper alone

    present = set(names)
    changes = {
        name: targets_by_clear_name[short]
        for name, short in _clear(names).items()
        if name not in targets
        and short in targets_by_clear_name
        and targets_by_clear_name[short] not in present
    }
    if len(set(changes.values())) < len(changes):
        return weights

    return selection.renamed(weights, changes) if changes else weights


def _clear(names: Iterable[str]) -> dict[str, str]:
    """The names by what they are without wrappers."""
    clear_names = {name: _WRAPPER.sub("", name) for name in names}
    while clear_names and all(short.startswith(_DATA_PARALLEL) for short in clear_names.values()):
        clear_names = {
            name: _WRAPPER.sub("", short.removeprefix(_DATA_PARALLEL))
            for name, short in clear_names.items()
        }

    return clear_names


def for_reader(
    unwrapped: NamedWeights,
    audience: Audience,
    request: Request,
    in_model_names: Callable[[NamedWeights], NamedWeights] = lambda model: model,
) -> NamedWeights:
    """The weights under the names that the reader knows, and that the user asks for.

    ``in_model_names`` gives the names of another framework those of the model, where the
    reader does not know them. Nothing is left out yet that the user does not want
    (``selected``).
    ``CheckpointError`` (kind "refused") where several models are saved as one and none
    of them is chosen.
    """
    wishes = request.naming
    model = as_wished(unwrapped, wishes)
    if _fit(audience, model.weights, {}) is not True:
        model = in_model_names(model)
        from ckpt.weights.naming import doubles

        doubled = doubles.doubles(model.weights)
        model = _known_form(model, audience, wishes.part is not None, doubled)
        if doubled and not wishes.select:
            model = _read_once(model, audience)

    return model


def selected(model: NamedWeights, wishes: Naming) -> NamedWeights:
    """Only the tensors that ``select`` names, by the names that they have now."""
    if not wishes.select:
        return model
    return model.with_only(selection.chosen(parts.every_name(model.weights), wishes.select))


def wished(weights: Weights, wishes: Naming) -> Weights:
    """The weights as ``strip``, ``rename``, ``part`` and ``select`` say, no more."""
    return selected(as_wished(NamedWeights(weights), wishes), wishes).weights


def as_wished(model: NamedWeights, wishes: Naming) -> NamedWeights:
    """The weights as ``strip``, ``rename`` and ``part`` say."""
    names = parts.every_name(model.weights)
    stripped = selection.new_names(names, wishes.strip, ())
    model = model.with_names(stripped, STRIP(", ".join(wishes.strip)))
    names = parts.every_name(model.weights)
    changed = selection.new_names(names, (), wishes.rename)
    text = ", ".join(f"{old}={new}" for old, new in wishes.rename)
    model = model.with_names(changed, RENAME(text))

    return model if wishes.part is None else _one_part(model, wishes.part)


def _one_part(model: NamedWeights, part: str) -> NamedWeights:
    names = parts.part(model.weights, part)
    prefix = f"{part.rstrip('.')}."
    chosen = model.with_only(names)
    return chosen.with_names({name: name.removeprefix(prefix) for name in names}, f"part {part}")


def _known_form(
    model: NamedWeights, audience: Audience, chosen: bool, doubled: frozenset[str]
) -> NamedWeights:
    """The names in a known form, or by the one rule that makes them fit a reader.

    The reader may know those that are ``doubled`` or not.
    """
    if not chosen and (groups := parts.roles(model.weights)):
        return _role(model, groups, audience)

    names = parts.every_name(model.weights)
    if all(name.startswith(_PEFT) for name in names) and not any(map(_ADAPTED.search, names)):
        return model.with_names({n: n.removeprefix(_PEFT) for n in names}, f"without {_PEFT}")

    for rule, changes in _candidates(names, audience) if audience.some else ():
        new = {changes.get(name, name) for name in names}
        if len(new) == len(names) and _fit(audience, model.weights, changes, doubled):
            return model.with_names(changes, rule)

    return _without_prefix(model, audience)


def _without_prefix(model: NamedWeights, audience: Audience) -> NamedWeights:
    """The names without a prefix that all have,
    if a reader knows none with it and all without.

    It may want a few more, which are not in the checkpoint.
    """
    read_names = parts.read_names(model.weights)
    match = audience.best(read_names, bridged=True)
    if match is None or match.fit.present:
        return model

    from ckpt.weights.reader import inner_models

    for rule, changes in shared_prefixes(parts.every_name(model.weights)):
        if inner_models.match_of([changes.get(name, name) for name in read_names], audience):
            return model.with_names(changes, rule)

    return model


def _read_once(model: NamedWeights, audience: Audience) -> NamedWeights:
    """The names without those that no reader wants and whose bytes others hold."""
    from ckpt.weights.naming import doubles

    names = parts.read_names(model.weights)
    match = audience.best(names, bridged=True)
    fit = match.fit if match is not None else audience.beside and audience.beside.fit(names)
    unread = doubles.doubles(model.weights).intersection(fit.unexpected if fit else ())
    read_names = [name for name in model.weights.tensors if name not in unread]
    holders_by_name = doubles.holders(model.weights, sorted(unread), read_names)
    if not holders_by_name:
        return model

    remaining_names = [
        name for name in parts.every_name(model.weights) if name not in holders_by_name
    ]
    inside = dict.fromkeys(holder for names in holders_by_name.values() for holder in names)
    note = (
        f"left out: {some(holders_by_name)}; these values are written under other "
        f"names, {some(inside)}"
    )

    return model.with_only(remaining_names).with_note(note)


VALUE_HEAD_NOTE = (
    "v_head.* is trl's value head: AutoModelForCausalLMWithValueHead reads it, and "
    "AutoModelForCausalLM passes over it"
)


def _role(model: NamedWeights, groups: Mapping[str, list[str]], audience: Audience) -> NamedWeights:
    """The one model of several that the configuration is of.

    Without a configuration all of them stay, as a training may load them so.
    """
    fitting = [
        part
        for part, names in groups.items()
        if _fit(audience, _one_part(NamedWeights(model.weights), part).weights, {})
    ]
    if len(fitting) == 1:
        others = ", ".join(part for part in groups if part != fitting[0])
        note = f"only {fitting[0]} is written, the model of config.json"
        part = _one_part(model, fitting[0])
        return part.with_note(f"{note}; not {others}") if others else part

    if len(groups) == 1:
        return model
    if audience.config is None or audience.custom:
        listed = parts.listed(groups)
        return model.with_note(f"several models are saved as one: {listed}; {PART} writes one")

    raise CheckpointError(
        f"{audience.root} holds several models as one: {parts.listed(groups)}; choose one "
        f"with {PART(next(iter(groups)))}, or write all as they are with "
        f"{NAMES('as-stored')}",
        "refused",
    )


def _fit(
    audience: Audience | None,
    weights: Weights,
    changes: Mapping[str, str],
    doubled: frozenset[str] = frozenset(),
) -> bool | None:
    """Whether names, after changes, are those of a reader; ``None`` if none is known."""
    if audience is None:
        return None

    names = parts.read_names(weights, changes)
    spare = [changes.get(name, name) for name in (*weights.aliases, *weights.absent, *doubled)]
    return audience.fits(names, frozenset(spare))


def shared_prefixes(names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rules that take off what all names begin with, the shortest first."""
    from ckpt.weights.reader import inner_models

    first = names[0].split(".") if names else []
    for depth in range(1, min(inner_models.MAX_PREFIX_PARTS, len(first) - 1) + 1):
        prefix = ".".join(first[:depth]) + "."
        if all(name.startswith(prefix) for name in names):
            yield (
                f"without {prefix}",
                {name: name.removeprefix(prefix) for name in names},
            )


def _candidates(names: list[str], audience: Audience) -> Iterator[tuple[str, dict[str, str]]]:
    """Rules that may give a reader its names: a prefix less, or the base's prefix more."""
    yield from shared_prefixes(names)
    for base in dict.fromkeys(f"{reader.prefix}." for reader in audience.readers if reader.prefix):
        bare = [name for name in names if not name.startswith(base)]
        yield f"with {base}", {name: base + name for name in bare}
        yield f"with {base}", {name: base + name for name in names}
        inside = [name for name in names if name.startswith(base)]
        yield f"without {base}", {name: name.removeprefix(base) for name in inside}

    inner = [name for name in names if f".{_DATA_PARALLEL}" in name]
    yield (
        f"without .{_DATA_PARALLEL}",
        {name: name.replace(f".{_DATA_PARALLEL}", ".") for name in inner},
    )
