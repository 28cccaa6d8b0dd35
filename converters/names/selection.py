"""The same weights under other names, or some of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from converters.errors import CheckpointError
from converters.extents import per_record
from converters.options import PART, RENAME, SELECT
from converters.tensors import METADATA, Checksum, TensorRef, Weights, record_index

MAX_PATTERN_LENGTH = 1_000  # characters of a regular expression
MAX_NAME_LENGTH = 1_000  # characters of a name that an expression is tried on, or gives


def new_names(
    names: Iterable[str], strip: Sequence[str], rename: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Old names to new ones, those that change only:
    prefixes dropped, then expressions replaced.

    ``rename`` are pairs of a regular expression and its replacement, as ``re.sub`` takes
    them. ``CheckpointError`` for a prefix or an expression that no name has, and for a
    bad one.
    """
    old_names = list(names)
    current = dict(zip(old_names, old_names, strict=True))
    for prefix in strip:
        if not prefix:
            raise CheckpointError(
                "the prefix to strip is empty; name one, as model.",
                "refused",
            )
        changed = {name: _without(text, prefix) for name, text in current.items()}
        _require_change(current, changed, f"no name begins with {prefix!r}")
        current = changed

    for expression, replacement in rename:
        from converters.names import substitution  # which starts processes

        _require_expression(expression)
        short_names = [name for name, text in current.items() if len(text) <= MAX_NAME_LENGTH]
        texts = substitution.replaced(
            expression,
            replacement,
            [current[name] for name in short_names],
        )
        changed = current | dict(zip(short_names, texts, strict=True))
        _require_change(current, changed, f"{expression!r} matches no name")
        current = changed

    return {name: text for name, text in current.items() if name != text}


def chosen(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that one of the globs matches;
    ``CheckpointError`` for a glob that matches none."""
    all_names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in all_names):
            raise CheckpointError(
                f"no name matches {glob!r}; the first is {next(iter(all_names), None)}", "refused"
            )

    return [name for name in all_names if any(fnmatchcase(name, glob) for glob in globs)]


def _require_expression(expression: str) -> None:
    problem = f"{expression[:80]!r} is not a regular expression"
    if len(expression) > MAX_PATTERN_LENGTH:
        raise CheckpointError(f"{problem}: it has over {MAX_PATTERN_LENGTH} characters", "refused")

    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{problem}: {error}", "refused") from error


def _without(name: str, prefix: str) -> str:
    """A name without a prefix,
    which may lack its dot; the name itself stays never empty."""
    remainder = name.removeprefix(prefix)
    if remainder != name and not prefix.endswith("."):
        remainder = remainder.removeprefix(".")
    return remainder or name


def _require_change(
    before: Mapping[str, str],
    after: Mapping[str, str],
    problem: str,
) -> None:
    if before == after:
        first = next(iter(before.values()), None)
        raise CheckpointError(f"{problem}; the first name is {first}", "refused")


def renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The weights with new names; ``names`` maps old to new, those it lacks stay.

    ``CheckpointError`` if two tensors would have the same name, or one a name that no
    file can have.
    """
    for old_name, name in names.items():
        require_writable(name, old_name)

    def new_name(old_name: str) -> str:
        return names.get(old_name, old_name)

    all_names = [*weights.tensors, *weights.aliases, *weights.absent]
    sources: dict[str, str] = {}
    for name in all_names:
        first_name = sources.setdefault(new_name(name), name)
        if first_name != name:
            raise CheckpointError(
                f"{name} and {first_name} would both be named {new_name(name)}; choose "
                f"with {SELECT} or {PART}, or rename one with {RENAME('OLD=NEW')}",
                "refused",
            )

    return replace(
        weights,
        tensors={new_name(name): tensor for name, tensor in weights.tensors.items()},
        aliases={new_name(alias): new_name(owner) for alias, owner in weights.aliases.items()},
        buffers=frozenset(map(new_name, weights.buffers)),
        absent={new_name(name): reason for name, reason in weights.absent.items()},
        copies={new_name(name): tensor for name, tensor in weights.copies.items()},
        order=tuple(map(new_name, weights.order)),
        frozen=frozenset(map(new_name, weights.frozen)),
        packed=frozenset(map(new_name, weights.packed)),
        trained=frozenset(map(new_name, weights.trained)),
        lost_ties={new_name(alias): new_name(owner) for alias, owner in weights.lost_ties.items()},
    )


def require_writable(name: str, old_name: str) -> None:
    """``CheckpointError`` for a new name that a file of weights cannot have,
    or not give back.

    ``__metadata__`` is not a tensor to safetensors; lone surrogates have no UTF-8.
    """
    if not name:
        problem = "is empty"
    elif name == METADATA:
        problem = f"is {METADATA}, which safetensors keeps for itself"
    elif len(name) > max(MAX_NAME_LENGTH, len(old_name)):
        problem = f"has {len(name)} characters, expected at most {MAX_NAME_LENGTH}"
    elif not name.isprintable():
        problem = f"has characters that cannot be written: {name!a}"
    else:
        return

    raise CheckpointError(
        f"the new name of {old_name} {problem}; choose another",
        "refused",
    )


def selected(weights: Weights, names: Collection[str]) -> Weights:
    """Only the tensors of these names;
    the first tied name of one that goes takes its place."""
    aliases: dict[str, str] = {}
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name in names}
    copies = {name: tensor for name, tensor in weights.copies.items() if name in names}
    heirs: dict[str, str] = {}

    for alias, owner in weights.aliases.items():
        if alias not in names:
            continue

        heir = owner if owner in names else heirs.setdefault(owner, alias)
        if heir != alias:
            aliases[alias] = heir
            continue

        tensors[alias] = weights.tensors[owner]
        if owner in weights.copies:
            copies[alias] = weights.copies[owner]

    ordered = {name: tensors[name] for name in weights.order if name in tensors}
    names_by_role = _names_by_role(weights, tensors, heirs)

    return replace(
        weights,
        tensors=ordered or tensors,
        aliases=aliases,
        absent={name: reason for name, reason in weights.absent.items() if name in names},
        copies=copies,
        checksums=proving([*tensors.values(), *copies.values()], weights.checksums),
        order=tuple(name for name in weights.order if name in tensors or name in aliases),
        buffers=names_by_role["buffers"],
        frozen=names_by_role["frozen"],
        packed=names_by_role["packed"],
        trained=names_by_role["trained"],
        lost_ties={alias: owner for alias, owner in weights.lost_ties.items() if alias in names},
    )


def without_frozen(weights: Weights) -> Weights:
    """The weights without the parameters that are not trained, as DeepSpeed's
    ``exclude_frozen_parameters`` leaves them out."""
    if not weights.frozen:
        return weights

    names = {*weights.tensors, *weights.aliases, *weights.absent}
    frozen_aliases = {alias for alias, owner in weights.aliases.items() if owner in weights.frozen}
    return selected(weights, names - weights.frozen - frozen_aliases)


def _names_by_role(
    weights: Weights, tensors: Iterable[str], heirs: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """The names of ``tensors`` in each role; ``heirs`` maps owners to their heirs.

    An heir has the roles of the owner whose place it takes.
    """
    former_owners = {heir: owner for owner, heir in heirs.items()}
    roles = {
        "buffers": weights.buffers,
        "frozen": weights.frozen,
        "packed": weights.packed,
        "trained": weights.trained,
    }

    return {
        role: frozenset(
            name for name in tensors if name in members or former_owners.get(name) in members
        )
        for role, members in roles.items()
    }


def proving(
    refs: Iterable[TensorRef],
    checksums: Iterable[Checksum],
) -> tuple[Checksum, ...]:
    """The checksums of the records that the tensors lie in; others need
    not be read."""
    records: dict[Path, list[Checksum]] = {}
    for checksum in checksums:
        records.setdefault(checksum.extent.path, []).append(checksum)

    for candidates in records.values():
        candidates.sort(key=lambda checksum: checksum.extent.offset)

    used: dict[tuple[Path, int], Checksum] = {}
    for extent in per_record(tensor.extents for tensor in refs):
        candidates = records.get(extent.path, [])
        first = record_index(candidates, extent.offset)
        for checksum in candidates[max(first, 0) :]:
            if checksum.extent.offset >= extent.end:
                break
            if checksum.extent.end > extent.offset:
                used[extent.path, checksum.extent.offset] = checksum

    return tuple(used[key] for key in sorted(used))
