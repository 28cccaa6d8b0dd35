"""The groups of tensors that belong together:
the codes of a quantized weight, and its constants."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from converters.tensors import DType, TensorRef, Weights


@dataclass(frozen=True, slots=True)
class QuantizedGroup:
    """The tensors that stand for one weight.

    ``scheme`` says how it is quantized, such as "bitsandbytes nf4"; ``weight`` is the
    name that the weight has (or had) as numbers. ``codes`` is the name of the tensor of
    codes, ``None`` where the checkpoint has only the constants. ``constants`` are names
    by role. ``kind`` is the formula.
    """

    kind: str
    scheme: str
    weight: str
    codes: str | None
    constants: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the group."""
        codes = () if self.codes is None else (self.codes,)
        return (*codes, *self.constants.values())


class Modules:
    """The tensors of a model by the module (or parameter) they are named under."""

    def __init__(self, weights: Weights):
        self.weights = weights

    @cached_property
    def _names(self) -> Mapping[str, str | list[str]]:
        """The names by their prefix. Sets of one name are no lists, and none are
        dictionaries: these take 40 MB for 100,000 modules."""
        names_by_prefix: dict[str, str | list[str]] = {}
        for name in chain(self.weights.tensors, self.weights.aliases):
            prefix = name.rpartition(".")[0]
            before = names_by_prefix.setdefault(prefix, name)
            if isinstance(before, list):
                before.append(name)
            elif before is not name:
                names_by_prefix[prefix] = [before, name]

        return names_by_prefix

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        return ((prefix, self.leaves(prefix)) for prefix in self._names)

    def leaves(self, prefix: str) -> Mapping[str, str]:
        """The names under a prefix, by their last part; none where there is no such module."""
        names = self._names.get(prefix, [])
        names = [names] if isinstance(names, str) else names
        return {name.rpartition(".")[2]: name for name in names}

    def ref(self, name: str) -> TensorRef:
        """The tensor of a name, tied ones too."""
        return self.weights.tensors[self.weights.aliases.get(name, name)]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.weights.tensors or name in self.weights.aliases

    def trained(self, name: str) -> bool:
        """Whether a tensor is (or may be) a parameter that is trained.

        Buffers and frozen parameters are not. Where a checkpoint names neither, nothing
        is known, and nothing counts as trained that has no master weights.
        """
        weights, owner = self.weights, self.weights.aliases.get(name, name)
        if owner in weights.copies:
            return True
        if owner in weights.frozen or owner in weights.buffers:
            return False

        says_untrained = bool(weights.frozen or weights.copies)
        return says_untrained and self.ref(name).dtype is DType.F32

    def constants(
        self,
        leaves: Mapping[str, str],
        roles: Collection[str],
    ) -> dict[str, str]:
        """The constants beside a weight: tensors of these names that are not trained."""
        return {
            role: leaves[role]
            for role in leaves
            if role in roles and not self.trained(leaves[role])
        }
