"""Names of the state dict that are unlike those of the parameters:
one rule that makes all fit.

``param_shapes`` has the names of ``named_parameters``, ``module`` those of
``state_dict``. A hook on the state dict (``_register_state_dict_hook``; torch's
``checkpoint_wrapper`` has one) makes them differ:

    parameters    layers.0._checkpoint_wrapped_module.mlp.weight
    module        layers.0.mlp.weight

Where nothing else tells which is which (placeholders of stage 3 have neither values nor
shapes), a rule is looked for that turns every name of a parameter into one of the state
dict: without the pieces that wrappers put in, or with one sequence of pieces in the
place of another. No rule is taken where two rules fit and name different tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

UNMISTAKABLE = (  # attributes that wrappers keep the wrapped module under, and nobody else uses
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",  # torch.distributed.algorithms._checkpoint.checkpoint_wrapper
    "_forward_module",  # Lightning, Accelerate, fairscale
)
WRAPPERS = (
    *UNMISTAKABLE,
    "module",  # DistributedDataParallel, DataParallel, DeepSpeed
    "_wrapped_module",
)
MAX_TRIALS = 1 << 20  # names put to the test of a rule; ends the search in odd files
Change = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Names:
    """Parameters by the names that the state dict has for them, as far as these differ.

    ``state`` maps the name of a parameter, of a buffer or of a frozen one to that in
    ``module``. ``rule`` turns others into theirs; ``None`` where no one rule does.
    ``pieces`` are parameters that the state dict has as several tensors.
    """

    state: Mapping[str, str] = field(default_factory=dict)
    rule: Change | None = None
    pieces: tuple[str, ...] = ()

    def of(self, name: str, module: Collection[str]) -> str:
        """The name that the state dict has for a parameter, a buffer or a tied name."""
        if name in self.state:
            return self.state[name]
        if name in module or self.rule is None:
            return name

        changed = self.rule(name)
        return changed if changed in module and changed is not None else name

    def extended(self, names: Iterable[str], module: Collection[str]) -> Names:
        """These names with the ones that the rule makes of further names in ``state``."""
        changed = {name: self.of(name, module) for name in names}
        further = {name: state for name, state in changed.items() if name != state}
        return Names({**self.state, **further}, self.rule, self.pieces)

    @property
    def parameters(self) -> dict[str, str]:
        """The other way round: names in ``module`` to those of the parameters."""
        return {state: name for name, state in self.state.items()}


def rule(
    names: Sequence[str],
    free_names: Collection[str],
    fits: Callable[[str, str], bool] = lambda _name, _state: True,
) -> Change | None:
    """The one rule that turns all of ``names`` into members of ``free_names``,
    each into another.

    ``fits`` says whether a name may stand for a member at all, such as by its shape.
    ``None`` if no rule does, or if several do and disagree.
    """
    free_names = set(free_names)
    if not names or len(free_names) < len(names):
        return None

    trials_left = MAX_TRIALS
    changes_by_result: dict[tuple[str, ...], Change] = {}
    for change in _changes(names, free_names):
        changed: dict[str, None] = {}
        for name in names:
            trials_left -= 1
            state = change(name)
            if state not in free_names or state in changed or not fits(name, state):
                break
            changed[state] = None

        if len(changed) == len(names):
            changes_by_result.setdefault(tuple(changed), change)
        if len(changes_by_result) > 1 or trials_left < 0:
            return None

    return next(iter(changes_by_result.values()), None)


def _changes(names: Sequence[str], free_names: Collection[str]) -> Iterator[Change]:
    """The rules worth a trial: without wrappers,
    with other pieces or letters, or both."""
    parts = {part for name in names for part in name.split(".")}
    present_wrappers = [wrapper for wrapper in WRAPPERS if wrapper in parts]
    for count in range(len(present_wrappers) + 1):
        for dropped in combinations(present_wrappers, count):
            strip_wrappers = _without(frozenset(dropped))
            if dropped:
                yield strip_wrappers

            # what the wrappers alone do not account for shows what else was changed
            stripped = map(strip_wrappers, names)
            first = next((name for name in stripped if name not in free_names), None)
            if first is None:
                continue

            for member in sorted(free_names):
                if _related(first, member):
                    for change in _replacing(first, member):
                        yield _both(strip_wrappers, change, free_names) if dropped else change


def _related(name: str, member: str) -> bool:
    """Whether two names have the first or the last piece in common."""
    before, after = name.split("."), member.split(".")
    return before[-1] == after[-1] or before[0] == after[0]


def _both(
    strip_wrappers: Callable[[str], str],
    change: Change,
    free_names: Collection[str],
) -> Change:
    """Wrappers taken off, and the change where that alone is not enough."""

    def both(name: str) -> str | None:
        stripped = strip_wrappers(name)
        if stripped in free_names:
            return stripped
        return change(stripped) or stripped

    return both


def _without(dropped: frozenset[str]) -> Callable[[str], str]:
    return lambda name: ".".join(part for part in name.split(".") if part not in dropped)


def _replacing(name: str, member: str) -> Iterator[Change]:
    """One sequence of pieces in the place of another:
    at the same place, or wherever it is.

    Last, letters in the place of others, as ``str.replace`` in a hook has it.
    """
    before, after = name.split("."), member.split(".")
    start, end = _common_ends(before, after)
    old_pieces = before[start : len(before) - end]
    new_pieces = after[start : len(after) - end]

    yield _at_start(start, old_pieces, new_pieces)
    yield _from_end(end, old_pieces, new_pieces)
    if old_pieces:
        yield _anywhere(old_pieces, new_pieces)

    start, end = _common_ends(name, member)
    if letters := name[start : len(name) - end]:
        yield _letters(letters, member[start : len(member) - end])


def _common_ends(first: Sequence[str], second: Sequence[str]) -> tuple[int, int]:
    """The numbers of items that two sequences share
    at their beginnings and at their ends."""
    end = 0
    while end < min(len(first), len(second)) and first[-1 - end] == second[-1 - end]:
        end += 1

    start = 0
    while start < min(len(first), len(second)) - end and first[start] == second[start]:
        start += 1

    return start, end


def _letters(old_letters: str, new_letters: str) -> Change:
    return lambda name: name.replace(old_letters, new_letters) if old_letters in name else None


def _at_start(start: int, old_pieces: list[str], new_pieces: list[str]) -> Change:
    def change(name: str) -> str | None:
        parts = name.split(".")
        stop = start + len(old_pieces)
        return (
            ".".join(parts[:start] + new_pieces + parts[stop:])
            if parts[start:stop] == old_pieces
            else None
        )

    return change


def _from_end(end: int, old_pieces: list[str], new_pieces: list[str]) -> Change:
    def change(name: str) -> str | None:
        parts = name.split(".")
        stop = len(parts) - end
        start = stop - len(old_pieces)
        if start < 0 or parts[start:stop] != old_pieces:
            return None
        return ".".join(parts[:start] + new_pieces + parts[stop:])

    return change


def _anywhere(old_pieces: list[str], new_pieces: list[str]) -> Change:
    """Every occurrence, as ``str.replace`` in a hook does it; at least one."""
    replaced = "." + ".".join(old_pieces) + "."
    replacing = "." + ".".join([*new_pieces, ""])

    def change(name: str) -> str | None:
        dotted = f".{name}."
        if replaced not in dotted:
            return None
        return dotted.replace(replaced, replacing).strip(".")

    return change
