"""DeepSpeed's universal format, read as the checkpoint that it was made from.

    ROOT/
      latest_universal                     the tag's name, as text
      TAG_universal/
        mp_rank_00_model_states.pt           the model file of stages 1 and 2; and/or
        zero_pp_rank_R_mp_rank_00_...        those of stage 3
        zero/optimizer_state.pt              what the ranks' files have alike, and param_groups
        zero/NAME/...                        a parameter and its states (``folders``)

``ds_to_universal.py`` of DeepSpeed 0.19.8 writes the first model file or the second ones, after the
stage that saved. Frozen parameters and buffers have files in ``zero``, too, which are not read: the
model file has them in their own type.

The order of the parameters and their param groups stand in the model file (``param_shapes``); where
they do not, a native checkpoint of the same model tells them (``like``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import (
    files,
    folder,
    groups,
    layout,
    states,
    torchzip,
    trees,
    views,
    zero,
    zero3,
)
from converters.errors import CheckpointError
from converters.groups import WEIGHTS, Group
from converters.parameters import assemble
from converters.states import Shape, State
from converters.tensors import TensorRef
from converters.torchzip import TorchFile
from converters.universal import folders
from converters.universal.folders import COMMON, MASTER, STEP
from converters.zero import Checkpoint

LATEST = "latest_universal"
SUFFIX = "_universal"
INFO = "universal_checkpoint_info"
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_Laid = tuple[dict[str, Shape], Any, Any]  # shapes by name, the options, what is kept: as trees


@dataclass(frozen=True, slots=True)
class Universal:
    """A universal folder: the checkpoint that it stands for, its param groups, and the rest.

    ``checkpoint`` has the stage that its model file is of, and the world size of the run; its
    ``ranks`` are ``optimizer_state.pt``, which ``common`` is as a tree (``trees``). ``models`` are
    the model files.
    """

    checkpoint: Checkpoint
    groups: tuple[Group, ...]
    common: Mapping[Any, Any]
    models: tuple[Path, ...]


def find(path: Path, tag: str | None = None) -> folder.Place:
    """The tag that ``path`` means: a folder with ``latest_universal``, or with ``zero`` itself.

    ``CheckpointError`` says what is there instead.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a universal checkpoint", "incomplete")
    if tag is None and (path / "zero").is_dir():
        return folder.Place(path.resolve().parent, path, path.resolve().name)
    there = sorted(found.parent.name for found in path.glob("*/zero") if found.is_dir())
    offer = f"it holds {', '.join(there)}: choose with --tag" if there else "none is in it"
    if tag is None:
        if not (path / LATEST).is_file():
            raise CheckpointError(
                f"{path} has no file {LATEST}, so it is no universal checkpoint; {offer}",
                "incomplete",
            )
        with open(path / LATEST, "rb") as file, files.named(path / LATEST):
            tag = file.read(4096).decode("utf-8", "replace").strip()
    if tag not in there:
        raise CheckpointError(f"{path} has no universal tag {tag!r}; {offer}", "incomplete")
    return folder.Place(path, path / tag, tag)


def read(path: Path, tag: str | None = None, like: Checkpoint | None = None) -> Universal:
    """Locates every tensor of a universal folder; reads pickles only, no tensor data.

    ``like`` gives the order of the parameters, and their groups, where the folder does not. Raises
    ``CheckpointError`` for what is damaged, incomplete or of a kind that is not read.
    """
    place = find(path, tag)
    try:
        return _read(place, like)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(
            f"{place.folder} contradicts itself ({error!r}): a file is damaged or of another "
            "conversion; make it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or place.folder}: {error.strerror}") from error


def _read(place: folder.Place, like: Checkpoint | None) -> Universal:
    models = _models(place)
    zero.refuse_foreign(models)
    inner = place.folder / "zero"
    if not (inner / COMMON).is_file():
        raise CheckpointError(
            f"{inner} has no {COMMON}, which has the param groups; the conversion did not finish: "
            "make it again",
            "incomplete",
        )
    common, tree = torchzip.read(inner / COMMON), trees.read(inner / COMMON).root
    if not isinstance(common.root, dict):
        raise CheckpointError(f"{common.path} holds no dict; make the universal folder again")
    rank = State(common, {"optimizer_state_dict": common.root})
    found: list[Group] = []
    files: list[TorchFile] = []
    for named, options, kept in _laid(models, rank, tree, like):
        group, used = folders.read(inner, named, options, kept)
        found.append(group)
        files += used
    made = _checkpoint(place, models, rank, found, files)
    _require_known(inner, made, found)
    return Universal(made, tuple(found), tree, tuple(model.path for model in models))


def _models(place: folder.Place) -> list[State]:
    """The model files: that of stages 1 and 2 where it is there, else those of stage 3."""
    found: dict[int, Path] = {}
    for path in sorted(place.folder.glob("*_states.pt")):
        name = _MODEL.fullmatch(path.name)
        if name is None or int(name["mp"]):
            raise CheckpointError(
                f"{path}: universal checkpoints of tensor, pipeline or expert parallelism are not "
                "supported yet",
                "unsupported",
            )
        found[-1 if name["rank"] is None else int(name["rank"])] = path
    if -1 in found:
        return [states.read(found[-1])]
    if 0 not in found:
        raise CheckpointError(
            f"{place.folder} has no model file (mp_rank_00_model_states.pt or "
            "zero_pp_rank_0_mp_rank_00_model_states.pt); copy it from the checkpoint that it was "
            "made from",
            "incomplete",
        )
    models = [states.read(found[rank]) for rank in sorted(found)]
    if sorted(found) != list(range(_world(models[0]))):
        raise CheckpointError(
            f"{place.folder} has the model files of ranks {sorted(found)}, but was saved by "
            f"{_world(models[0])}; copy the others from the checkpoint that it was made from",
            "incomplete",
        )
    return models


def _world(model: State) -> int:
    found = model.root.get("dp_world_size")
    if type(found) is not int or found < 1:
        raise model.fail(f"dp_world_size is {found!r}, expected a number of ranks")
    return found


def _stage(models: Sequence[State], rank: State) -> int:
    """3 for placeholders, else 1 or 2: what the model file is of, whoever saved it first."""
    if models[0].path.name.startswith("zero_pp_rank_"):
        return 3
    stage = rank.optimizer.get("zero_stage", 1)  # BF16_Optimizer states none, and works as 1
    return 1 if stage == 1 else 2


def _laid(
    models: Sequence[State], rank: State, tree: Any, like: Checkpoint | None
) -> Iterator[_Laid]:
    """Each param group: its shapes in the optimizer's order, its options, what is kept once."""
    options = tree["param_groups"]
    inner = tree.get("optimizer_state_dict") or {}
    kept = inner.get("state") or {}
    shapes = states.shapes(models[0], "param_shapes")
    firsts = list(range(len(options)))
    if like is not None:
        held = groups.read(like, trees.read(like.ranks[0].path).root)
        laid = [dict(group.shapes) for group in held]
    elif shapes is None or not isinstance(models[0].root["param_shapes"], list):
        raise CheckpointError(
            f"{models[0].path} records no param_shapes by group, so the order of the parameters "
            "is not known; name a native checkpoint of the same model with --like",
            "incomplete",
        )
    elif _stage(models, rank) == 3:
        members = [group["params"] for group in options]
        if [index for part in members for index in part] != list(range(len(shapes))):
            raise rank.fail(f"its param groups hold {members}, expected {len(shapes)} sub-groups")
        laid = [{n: s for i in part for n, s in shapes[i].items()} for part in members]
        firsts = [part[0] if part else -1 for part in members]
        for part in members:
            steps = {folders.number(kept.get(index, {}).get(STEP)) for index in part}
            if len(steps) > 1:
                raise rank.fail(f"the sub-groups {part} have unlike steps, {sorted(steps)}")
    else:
        shuffled = models[0].setting("zero_optimization", "round_robin_gradients") is True
        laid = [
            {n: named[n] for n in layout.dealt_back(list(named), _world(models[0]))}
            if shuffled
            else named
            for named in shapes
        ]
    if len(laid) != len(options):
        raise rank.fail(
            f"it has {len(options)} param groups, param_shapes {len(laid)}; "
            "name a native checkpoint of the same model with --like"
        )
    for named, held_options, first in zip(laid, options, firsts, strict=True):
        without = {key: value for key, value in held_options.items() if key != "params"}
        if named:
            yield named, without, kept.get(first, {})


def _checkpoint(
    place: folder.Place,
    models: Sequence[State],
    rank: State,
    found: Sequence[Group],
    files: Sequence[TorchFile],
) -> Checkpoint:
    """What the folder stands for; names, ties and what is frozen as the model files tell them."""
    stage, world = _stage(models, rank), _world(models[0])
    ranks = [rank] * world
    if stage == 3:
        ranks = _partitioned(rank, models[0], found, world)
        parameters = zero3.parameters(place.folder, models, ranks)
    else:
        masters = {name: ref for group in found for name, ref in group.values[WEIGHTS].items()}
        shapes = [dict(group.shapes) for group in found]
        parameters = views.complete(models[0], masters, shapes)
    sources = [*models, *(State(file, {}) for file in files)]
    weights = assemble(models[0], parameters, sources)
    step = models[0].root.get("global_steps")
    return Checkpoint(
        place,
        stage,
        world,
        zero.precision(models[0], weights),
        step if isinstance(step, int) else None,
        models[0].version,
        {state.path: state.file.digest for state in (*sources, rank)},
        weights,
        tuple(parameters.notes),
        models[0],
        tuple(ranks),
    )


def _partitioned(rank: State, model: State, found: Sequence[Group], world: int) -> list[State]:
    """The optimizer files that the ranks of stage 3 would have had, as far as weights go."""
    masters: dict[str, TensorRef] = {}
    for group in found:
        masters |= group.values[WEIGHTS]
    shapes = states.shapes(model, "param_shapes") or []
    made = []
    for number in range(world):
        flats = [
            TensorRef.concat(layout.cut3(masters[name], number, world) for name in named)
            for named in shapes
        ]
        optimizer = {**rank.optimizer, "fp32_flat_groups": flats}
        made.append(State(rank.file, {"optimizer_state_dict": optimizer}))
    return made


def _require_known(inner: Path, made: Checkpoint, found: Sequence[Group]) -> None:
    """Raises for a folder of a parameter that the model has not, or that would lose its states."""
    known = {*made.weights.order, COMMON}
    trained = {name for group in found for name in group.shapes}
    for path in sorted(inner.iterdir()):
        if path.name not in known:
            raise CheckpointError(
                f"{path} is no parameter of the model in {made.model.path.name}; it is of another "
                "conversion: move it away"
            )
        if path.name not in trained and any(held.stem != MASTER for held in path.glob("*.pt")):
            raise CheckpointError(
                f"{path} has optimizer state, but no param group has {path.name}: the order of "
                "the parameters (param_shapes, or --like) is of another model"
            )
