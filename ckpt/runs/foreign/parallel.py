"""Checkpoints of DeepSpeed of more parallelism than ZeRO:
whether all their files are there.

What is shown of them here, without reading their states: DeepSpeed named the tag in
``latest``, which it does last (0.19.8 ``runtime/engine.py``: ``save_checkpoint``), every
file is whole by its form, and every file is there that the model files'
``mp_world_size``, ``dp_world_size`` and ``num_experts`` ask for. Of a pipeline the
layers are known by the names of the trained parameters (``3.mlp.weight`` is of
``layer_03``, ``tied_modules.embed.weight`` of a layer of its own), which the model files
have as ``param_shapes`` and the optimizer files as ``param_slice_mappings``. Without
ZeRO in fp32 neither is written, nor is a layer named that trains nothing: there a
layer's files are asked for of all model ranks, or of none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.runs.foreign import intact_files
from ckpt.runs.foreign.proofs import Proof, shapes_of
from ckpt.runs.run import step_in
from converters.accessors import is_whole_number, missing_numbers
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Source
from converters.zero.files import discovery as folders
from converters.zero.files import state_files
from converters.zero.files.state_files import State

_PARTITION = LazyPattern(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL = LazyPattern(r"mp_rank_(\d+)_model_states\.pt")
_PARTITIONED_MODEL = LazyPattern(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_?model_states\.pt")
_EXPERT = LazyPattern(r"layer_(\d+)_expert_(\d+)_mp_rank_\d+_model_states\.pt")
_LAYER = LazyPattern(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_OF_LAYER = LazyPattern(r"(\d+)\..+")
_TIED = LazyPattern(r"tied_modules\.([^.]+)\..+")
_MAX_RANKS = 1 << 20  # more than that a file can hardly mean
Ranks = dict[int, set[int]]


@dataclass(slots=True)
class _Files:
    """Which files are there: partitions by model rank, experts and model ranks by layer."""

    model_ranks: set[int] = field(default_factory=set)
    partitions: Ranks = field(default_factory=lambda: defaultdict(set))
    partitioned_models: Ranks = field(default_factory=lambda: defaultdict(set))
    experts: Ranks = field(default_factory=lambda: defaultdict(set))
    layers: Ranks = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def of(cls, paths: Iterable[Path]) -> _Files:
        files = cls()
        for path in paths:
            if match := _MODEL.fullmatch(path.name):
                files.model_ranks.add(int(match[1]))
            elif match := _PARTITION.fullmatch(path.name):
                files.partitions[int(match[2])].add(int(match[1]))
            elif match := _PARTITIONED_MODEL.fullmatch(path.name):
                files.partitioned_models[int(match[2])].add(int(match[1]))
            elif match := _EXPERT.fullmatch(path.name):
                files.experts[int(match[1])].add(int(match[2]))
            elif match := _LAYER.fullmatch(path.name):
                files.layers[int(match[1])].add(int(match[2] or 0))

        return files


def prove(folder: Path, kind: str, source: Source | None, tag: str | None) -> Proof:
    """The proof of a checkpoint; ``kind`` says who wrote it.

    Without a ``source``, of a form that is not read here, it has no shapes, so that it
    gets no manifest. ``CheckpointError`` as ``require_parallel``.
    """
    tag = require_parallel(folder, tag)
    kind = f"{kind} (parallel)"
    if source is None:
        return Proof(folder, kind, step_in(tag), tag)

    step = step_in(tag) if source.step is None else source.step
    return Proof(folder, kind, step, tag, shapes=shapes_of(source), source=source)


def require_parallel(folder: Path, tag: str | None = None) -> str:
    """The tag; ``CheckpointError`` unless all
    that can be shown of the checkpoint is shown."""
    place = folders.find(folder, tag)
    state_paths = sorted(
        state_path for state_path in place.folder.iterdir() if state_path.suffix == ".pt"
    )
    for state_path in state_paths:
        intact_files.require_torch_file(state_path)

    files = _Files.of(state_paths)
    model = _model(state_paths)
    _refuse_further_ranks(place.folder, state_paths, files, model)
    _require_ranks(place.folder, files, model)
    _require_layers(place.folder, files, model)
    if model is not None and model.root.get("module", {}) is None:  # which a pipeline leaves out
        _require_named_layers(place.folder, files, _trained_names(state_paths))

    return place.tag


def _model(state_paths: Iterable[Path]) -> State | None:
    """The first model file, which says of how many ranks the training is; ``None`` if
    none can be read."""
    for path in state_paths:
        if not (_MODEL.fullmatch(path.name) or _PARTITIONED_MODEL.fullmatch(path.name)):
            continue
        try:
            return state_files.read(path)
        except CheckpointError as error:
            if error.kind not in ("unsupported", "refused"):
                raise

    return None


def _refuse_further_ranks(
    folder: Path, state_paths: Iterable[Path], files: _Files, model: State | None
) -> None:
    """``CheckpointError`` where model files of higher ranks
    were left behind by a save of more ranks."""
    by_rank = files.model_ranks or set(files.partitioned_models)
    count = _count(model, "mp_world_size")
    if not count or max(by_rank, default=0) < count:
        return

    from converters.zero.model_ranks import one_save  # which most checkpoints need not

    models: dict[int, State] = {}
    for path in state_paths:
        match = _MODEL.fullmatch(path.name) or _PARTITIONED_MODEL.fullmatch(path.name)
        if match and int(match[match.lastindex or 0]) not in models:
            models[int(match[match.lastindex or 0])] = state_files.read(path)
    one_save.require_no_further_ranks(folder, models)


def _require_ranks(folder: Path, files: _Files, model: State | None) -> None:
    """``CheckpointError`` unless every model rank has its model file
    and all its partitions."""
    by_rank = {*files.model_ranks, *files.partitions, *files.partitioned_models}
    model_ranks = set(range(_count(model, "mp_world_size"))) | by_rank
    with_model = files.model_ranks or set(files.partitioned_models)
    _require_numbered(folder, "mp_rank", model_ranks, with_model)
    if not files.partitions:
        return

    mics_ranks = model.setting("zero_optimization", "mics_shard_size") if model else None
    is_shared_by_few = is_whole_number(mics_ranks, 1)
    data_ranks = set() if is_shared_by_few else set(range(_count(model, "dp_world_size")))
    partitions = data_ranks.union(*files.partitions.values(), *files.partitioned_models.values())
    for model_rank in sorted(model_ranks):
        for name, present in (
            ("optim_states", files.partitions),
            ("model_states", files.partitioned_models),
        ):
            if present:
                description = f"{name} of mp_rank {model_rank}: zero_pp_rank"
                _require_numbered(folder, description, partitions, present.get(model_rank, set()))


def _require_layers(folder: Path, files: _Files, model: State | None) -> None:
    """``CheckpointError`` unless all experts of a layer are there,
    and a layer's model ranks."""
    counts = model.root.get("num_experts") if model else None
    are_counts = isinstance(counts, list) and len(counts) == len(files.experts)
    for index, (layer, experts) in enumerate(sorted(files.experts.items())):
        count = counts[index] if are_counts and isinstance(counts, list) else 0
        expected = set(range(count)) if is_whole_number(count) and count < _MAX_RANKS else set()
        _require_numbered(folder, f"layer {layer}: expert", expected | experts, experts)

    layer_models = set[int]().union(*files.layers.values())
    for layer, models in sorted(files.layers.items()):
        _require_numbered(folder, f"layer {layer}: model", layer_models, models)


def _require_named_layers(folder: Path, files: _Files, names: Iterable[str]) -> None:
    """``CheckpointError`` unless each layer that has a trained parameter has its files."""
    layers, tied_modules = set[int](), set[str]()
    for name in names:
        if match := _OF_LAYER.fullmatch(name):
            layers.add(int(match[1]))
        elif match := _TIED.fullmatch(name):
            tied_modules.add(match[1])

    missing_layers = sorted(layers - files.layers.keys())
    if missing_layers:
        raise CheckpointError(
            f"{folder} has no file of layer {missing_layers[0]} "
            f"(layer_{missing_layers[0]:02d}...-model_states.pt)",
            "incomplete",
        )

    others = len(files.layers.keys() - layers)
    if others < len(tied_modules):
        raise CheckpointError(
            f"{folder} has no file of the layer that holds tied_modules."
            f"{min(tied_modules)}: it has layer files of {len(layers):,} layers with parameters of "
            f"their own and {others:,} others, expected {len(tied_modules):,}",
            "incomplete",
        )


def _trained_names(state_paths: Iterable[Path]) -> set[str]:
    """The names of trained parameters in the files that name them."""
    names: set[str] = set()
    for path in state_paths:
        if not (_MODEL.fullmatch(path.name) or _PARTITION.fullmatch(path.name)):
            continue
        try:
            root = state_files.read(path).root
        except CheckpointError as error:
            if error.kind not in ("unsupported", "refused"):
                raise
            continue

        optimizer = root.get("optimizer_state_dict")
        groups = optimizer.get("param_slice_mappings") if isinstance(optimizer, Mapping) else None
        for group_list in (root.get("param_shapes"), groups):
            for group in group_list if isinstance(group_list, list) else ():
                names.update(map(str, group if isinstance(group, Mapping) else ()))

    return names


def _count(model: State | None, key: str) -> int:
    """A number of ranks, as the model file has it; 0 where it says nothing of use."""
    count = model.root.get(key) if model else None
    return int(count) if is_whole_number(count) and count < _MAX_RANKS else 0


def _require_numbered(
    folder: Path,
    description: str,
    numbers: set[int],
    present_numbers: set[int] | None = None,
) -> None:
    """``CheckpointError`` if a number up to the highest of ``numbers`` is not present."""
    present = numbers if present_numbers is None else present_numbers
    absent_numbers = missing_numbers(max(numbers, default=-1) + 1, present)
    if absent_numbers:
        raise CheckpointError(
            f"{folder} has no file of {description} {absent_numbers[0]}", "incomplete"
        )
