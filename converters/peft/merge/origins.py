"""The places of a merged model's values before any adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from converters import words
from converters.errors import CheckpointError
from converters.options import BASE
from converters.tensors import Checksum, DType, Extent, TensorRef, Weights


@dataclass(frozen=True, slots=True)
class Base:
    """Weights of the base model from elsewhere, and words for where they are from.

    ``inner`` is the prefix of their names where they were saved from within the model
    (``model.``): what lies outside of it, such as the head, is not among them.
    ``of_other_class`` says that they were saved as another class, which may lack the
    trained one's pooler or head.
    """

    weights: Weights
    place: str
    inner: str = ""
    of_other_class: bool = False

    def lacks(self, name: str) -> bool:
        """Whether a name lies outside of the part of the model that was saved."""
        if self.inner and not name.startswith(self.inner):
            return True
        return self.of_other_class and not any(map(str.isdecimal, name.split(".")))  # of no layer


@dataclass(frozen=True)
class Origins:
    """``plain`` maps names of the model to those in the checkpoint, ``saved`` those of
    trained copies that take the place of the first. Without ``base`` all is the
    checkpoint's; with it, what was not trained is the base's, and the checkpoint's is
    its copy, to compare with. ``adapted`` are names of weights that an adapter changes;
    ``biased`` says that biases are trained. ``adapter_sources`` are names in the
    checkpoint that are the adapter's in any case: embeddings that PEFT saves with it,
    which take the place of the base's."""

    weights: Weights
    plain: Mapping[str, str]
    saved: Mapping[str, str]
    base: Base | None
    adapted: frozenset[str] = frozenset()
    biased: bool = False
    adapter_sources: frozenset[str] = frozenset()

    @cached_property
    def sources(self) -> dict[str, str]:
        """The name in the checkpoint of the values
        that each tensor has before any change."""
        return {**self.plain, **self.saved}

    @cached_property
    def holds_base(self) -> bool:
        """Whether the checkpoint has frozen weights of the model,
        not only what was trained."""
        plain = self.plain.items()
        base_sources = {
            name: source for name, source in plain if source not in self.adapter_sources
        }
        return holds_base(self.weights, base_sources, self.adapted)

    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor of the model; tied names have the same one."""
        located = {}
        for name in self.names():
            located[name] = self.tensor(name)
        return located

    def names(self) -> list[str]:
        """The trained model's names;
        with the base's where only what was trained is saved."""
        own_names = list(self.sources)
        if self.base is None:
            return own_names

        base_tensors = self.base.weights.tensors
        if self.holds_base:
            constants = {
                name
                for name in own_names
                if self.sources[name] in self.weights.packed and name not in base_tensors
            }
            return [name for name in own_names if name not in constants]

        return list(dict.fromkeys((*base_tensors, *self.base.weights.aliases, *own_names)))

    def dropped(self) -> tuple[str, ...]:
        """Names of the base that the trained model has not."""
        if self.base is None or not self.holds_base:
            return ()
        return tuple(name for name in self.base.weights.tensors if name not in self.sources)

    def outside(self) -> tuple[str, ...]:
        """Frozen names outside of what the base has,
        whose values are the checkpoint's."""
        if self.base is None:
            return ()

        frozen = self.weights.frozen
        base_tensors = self.base.weights.tensors
        lacking = (
            name
            for name, source in self.plain.items()
            if source in frozen and self.base.lacks(name)
        )

        taken_elsewhere = base_tensors.keys() | self.saved.keys()
        return tuple(name for name in lacking if name not in taken_elsewhere)

    def owner(self, source: str) -> str:
        """The name in the checkpoint that a name in it is tied to, or itself."""
        return self.weights.aliases.get(source, source)

    def tied_to(self, name: str) -> str | None:
        """The name of the model that another is tied to,
        or was before it was trained apart."""
        aliases = self.weights.aliases
        owner = aliases.get(self.sources.get(name, "")) or aliases.get(self.plain.get(name, ""))
        if owner is None:
            return None if self.base is None else self.base.weights.aliases.get(name)

        for sources in (self.sources, self.plain):
            for candidate, source in sources.items():
                if source == owner:
                    return candidate

        return None

    def is_trained(self, name: str) -> bool:
        """Whether the checkpoint has trained values of a tensor of the model."""
        source = self.sources.get(name)
        if source is None:
            return False

        weights, owner = self.weights, self.owner(source)
        if weights.trained:
            return owner in weights.trained

        untrained = weights.frozen | weights.buffers | weights.packed
        if not weights.frozen and self.holds_base:  # stage 0 does not say what is frozen
            return name in self.saved or (self.biased and name.endswith(".bias"))

        return not ({source, owner} & untrained) and name not in self._owned_elsewhere

    @cached_property
    def _owned_elsewhere(self) -> frozenset[str]:
        """The names that the base ties to one that is not here:
        that one was excluded as frozen."""
        aliases = self.base.weights.aliases if self.base is not None else {}
        return frozenset(alias for alias, owner in aliases.items() if owner not in self.sources)

    def is_of_checkpoint(self, name: str) -> bool:
        """Whether the checkpoint's values of a tensor
        are taken whatever the base has."""
        source = self.sources.get(name, "")
        return self.is_trained(name) or self.owner(source) in self.adapter_sources

    def is_of_base(self, name: str) -> bool:
        """Whether the values of a tensor are those of the base from elsewhere."""
        return self.base is not None and id(self.tensor(name)) in self._copies

    def tensor(self, name: str) -> TensorRef:
        """The values of a tensor before any adapter."""
        source = self.sources.get(name)
        stored = None if source is None else self.weights.tensors[self.owner(source)]
        if self.base is None or (stored is not None and self.is_of_checkpoint(name)):
            assert stored is not None
            return stored
        if source is None or stored is None:
            base = self.base.weights
            owner = base.aliases.get(name, name)
            if owner in self.plain and owner not in self.saved:
                return self.tensor(owner)
            return base.tensors[owner]

        base_tensor = self._in_base(name, source)
        if base_tensor is None:
            if source in self.weights.buffers or self.base.lacks(name):
                return stored
            raise CheckpointError(
                f"{self.base.place} has no {name}, which the checkpoint has frozen as "
                f"{source}: it is another model; name the base that was trained on with "
                f"{BASE}",
                "refused",
            )
        if source in self.weights.buffers and stored.shape != base_tensor.shape:
            return stored  # such as final_logits_bias, of as many tokens as there are

        self._require_shape(name, source, stored, base_tensor)
        return base_tensor

    def _in_base(self, name: str, source: str) -> TensorRef | None:
        """The base's tensor of this name,
        or of one that is tied to it in the checkpoint."""
        assert self.base is not None
        base_tensors = self.base.weights.tensors
        tied = [*self._names_by_owner.get(self.owner(source), []), name]
        aliases = self.base.weights.aliases
        every = (*tied, *(aliases[n] for n in tied if n in aliases))

        return next((base_tensors[n] for n in every if n in base_tensors), None)

    @cached_property
    def _names_by_owner(self) -> dict[str, list[str]]:
        names_by_owner: dict[str, list[str]] = {}
        for name, source in self.plain.items():
            names_by_owner.setdefault(self.owner(source), []).append(name)
        return names_by_owner

    def _require_shape(
        self,
        name: str,
        source: str,
        stored: TensorRef,
        base_tensor: TensorRef,
    ) -> None:
        assert self.base is not None
        if source in self.weights.packed or stored.shape == base_tensor.shape:
            return

        alternative = ""
        if self.holds_base:
            alternative = f", or merge into the checkpoint's own copy, without {BASE}"
        raise CheckpointError(
            f"{self.base.place} has {name} of shape {words.shape(base_tensor.shape)}, the "
            f"checkpoint has {source} of {words.shape(stored.shape)}: it is another "
            f"model; name the base that was trained on with {BASE}{alternative}",
            "refused",
        )

    @cached_property
    def _copies(self) -> dict[int, TensorRef | None]:
        """The checkpoint's frozen copy of each tensor of the base,
        by the tensor's identity."""
        if self.base is None:
            return {}

        copy_by_tensor: dict[int, TensorRef | None] = {}
        for name, tensor in self.base.weights.tensors.items():
            source = self.plain.get(name)
            stored = None if source is None else self.weights.tensors[self.owner(source)]
            comparable = (
                stored is not None
                and source not in self.weights.packed
                and stored.dtype.floating
                and stored.shape == tensor.shape
            )

            copy_by_tensor[id(tensor)] = stored if comparable else None

        return copy_by_tensor

    @cached_property
    def _checkpoint_copies(self) -> dict[int, TensorRef]:
        """The 16-bit copy of each tensor of the checkpoint,
        by the identity of the tensor."""
        weights = self.weights
        return {id(weights.tensors[name]): copy for name, copy in weights.copies.items()}

    def copy_of(self, tensor: TensorRef) -> TensorRef | None:
        """The tensor that holds the same values
        as one that is read, rounded perhaps."""
        return self._copies.get(id(tensor)) or self._checkpoint_copies.get(id(tensor))

    def main_dtype(self, tensors: Mapping[str, TensorRef]) -> DType:
        """The type of most bytes that are not trained."""
        sizes: dict[DType, int] = {}
        for name, tensor in tensors.items():
            if tensor.dtype.floating and not self.is_trained(name):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)

    def base_checksums(self, tensors: Mapping[str, TensorRef]) -> tuple[Checksum, ...]:
        """The checksums that prove the files of the base, as far as they are read."""
        if self.base is None:
            return ()

        used = [tensor for tensor in tensors.values() if id(tensor) in self._copies]
        stated = self.base.weights.checksums
        paths = {checksum.extent.path for checksum in stated}

        return (
            *(
                checksum
                for checksum in stated
                if any(_lies_in(tensor, checksum.extent) for tensor in used)
            ),
            *(Checksum(run, None) for run in _runs(used) if run.path not in paths),
        )


def holds_base(
    weights: Weights,
    plain: Mapping[str, str],
    adapted: Collection[str],
) -> bool:
    """Whether there are weights of the model that is adapted, not only what was trained.

    ``plain`` maps names of the model to those in ``weights``, ``adapted`` are names of
    the model. Tied weights tell nothing: they are saved where frozen ones are excluded,
    too (``storage_views``).
    """
    tied = {*weights.aliases, *weights.aliases.values()} if weights.frozen else set()
    untied = [name for name in adapted if name in plain and plain[name] not in tied]
    if untied and (len(untied) == len(adapted) or not weights.trained):
        return True
    return any(source in weights.frozen and source not in tied for source in plain.values())


def _lies_in(tensor: TensorRef, record: Extent) -> bool:
    return any(
        extent.path == record.path and record.offset <= extent.offset < record.end
        for extent in tensor.extents.per_record()
    )


def _runs(refs: Iterable[TensorRef]) -> list[Extent]:
    """The runs of bytes that tensors take, those that touch as one."""
    extents = {extent for tensor in refs for extent in tensor.extents if extent.length}
    runs: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (str(extent.path), extent.offset)):
        last = runs[-1] if runs else None
        if last is not None and last.path == extent.path and last.end == extent.offset:
            runs[-1] = Extent(last.path, last.offset, last.length + extent.length)
        else:
            runs.append(extent)

    return runs
