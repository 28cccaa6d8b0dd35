"""How a checkpoint is split up beside ZeRO,
by the names of its files and the first of them.

    mp_rank_00_*, mp_rank_01_*      tensor-parallel ranks, or stages of them
    layer_00-model_01-*             stages, each of two tensor-parallel ranks
    layer_0_expert_3_mp_rank_00_*   experts; the names of param groups say on how many ranks

No tensor is located, and nothing is judged: that is what reading and rewriting do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters import words
from converters.accessors import is_whole_number
from converters.lazy_pattern import LazyPattern
from converters.source import Place
from converters.zero.experts import auto_ep
from converters.zero.files.state_files import State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import folder_files
from converters.zero.model_ranks.folder_files import FolderFiles

_EXPERT_GROUP = LazyPattern(r"ep_size_(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Degrees:
    """The ranks that share a model beside ZeRO.

    ``expert_ranks`` are the numbers of ranks that experts are dealt out to, one where
    all layers have the same, none without experts; ``None`` where that is not known.
    """

    tensor_ranks: int = 1
    stages: int = 1
    expert_ranks: tuple[int, ...] | None = ()

    def go_with(self, target: Degrees) -> bool:
        """Whether an engine of the others loads it, as far as both are known."""
        sizes = (self.expert_ranks, target.expert_ranks)
        are_alike = None in sizes or sizes[0] == sizes[1]
        return are_alike and (self.tensor_ranks, self.stages) == (
            target.tensor_ranks,
            target.stages,
        )

    def __str__(self) -> str:
        """The degrees beyond ZeRO, in brackets after a space; empty without."""
        facts = []
        if self.tensor_ranks > 1:
            facts.append(f"{self.tensor_ranks} tensor-parallel")
        if self.stages > 1:
            facts.append(f"{self.stages} pipeline stages")
        if self.expert_ranks:
            facts.append(f"experts on {words.numbers(self.expert_ranks)}")
        return f" ({', '.join(facts)})" if facts else ""


NONE = Degrees()


def of_place(place: Place) -> Degrees:
    """The degrees of the files of a tag; reads a model file and an optimizer file where
    their names tell of more than ZeRO, or of stage 3."""
    files = folder_files.scan(place)
    count = len(files.model_ranks)
    model = _first_model(files)
    if model is None:
        return Degrees(max(count, 1))

    layers = auto_ep.layers_of(model)
    expert_ranks: tuple[int, ...] = ()
    if layers or files.experts:
        stated = {len(layer.experts) for layer in layers} or set(_stated_sizes(files))
        expert_ranks = tuple(sorted(stated))

    tensor_ranks = count
    if files.layers:
        tensor_ranks = 1 + max(rank for _, rank in files.layers)
    recorded = model.root.get("checkpoint_parallel_dimensions")
    if isinstance(recorded, dict):
        stages, degree = recorded.get("pp_degree"), recorded.get("tp_degree")
        # under sequence parallelism it says that degree
        if is_whole_number(stages, 1) and is_whole_number(degree, 1) and stages * degree == count:
            tensor_ranks = degree

    return Degrees(tensor_ranks, max(count // tensor_ranks, 1), expert_ranks)


def _first_model(files: FolderFiles) -> State | None:
    """The first model file; ``None`` where none is needed, or there is none."""
    is_split = len(files.model_ranks) > 1 or files.layers or files.experts
    paths: list[Path] = []
    if is_split:
        paths = [path for _, path in sorted(files.models.items())]
    for by_rank in files.partitioned.values():
        paths += [path for _, path in sorted(by_rank.items())]
    return folder_files.read(paths[0]) if paths else None


def _stated_sizes(files: FolderFiles) -> Iterator[int]:
    """The numbers of expert ranks in the names
    of the param groups of the first optimizer."""
    paths = [
        path
        for by_model_rank in (files.optimizers, files.expert_optimizers)
        for by_rank in by_model_rank.values()
        for _, path in sorted(by_rank.items())
    ]
    if not paths:
        return

    state = folder_files.read(paths[0])
    section = state.fields.section("optimizer_state_dict" if files.optimizers else "optimizer")
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in section.values:
            section = section.section(key)
    for group in section.dicts("param_groups"):
        name = Section(state.path, "param_groups", group).values.get("name")
        if isinstance(name, str) and (match := _EXPERT_GROUP.fullmatch(name)):
            yield int(match[1])
