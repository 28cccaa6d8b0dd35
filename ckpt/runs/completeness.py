"""Whether what was written without ckpt is a whole checkpoint that a training can go on from.

Nobody said that its save finished. So each kind is judged by what its writer writes, and in which
order, without torch and without running a pickle:

    the Trainer                  weights, optimizer.pt, scheduler.pt, RNG states of all ranks, and
                                 trainer_state.json last (transformers 5.23 ``trainer.py``:
                                 ``_save_checkpoint``)
    the Trainer with FSDP        pytorch_model_fsdp_0/ and optimizer_0/, or the .bin of that name
                                 (accelerate 1.15 ``utils/fsdp_utils.py``)
    DeepSpeed, in any of these   the state files of a tag, as ``zero.read`` has them
    Accelerate's save_state      weights, optimizer.bin, random_states_R.pkl (accelerate 1.15
                                 ``checkpointing.py``: ``save_accelerator_state``)
    Lightning                    X.ckpt: a zip, or a folder of DeepSpeed or FSDP (lightning 2.6.6)
    torch's DCP                  .metadata and what it describes
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.runs import intact
from ckpt.runs.parallel import require_parallel
from ckpt.runs.run import is_checkpoint, is_numbered, step_in
from converters import zero
from converters.errors import CheckpointError
from converters.folder import is_tag_folder

STATE = "trainer_state.json"
RNG = r"rng_state_(\d+)\.pth"
RANDOM = r"random_states_(\d+)\.pkl"
_LIGHTNING = "pytorch-lightning_version"
_NAME = re.compile(r"(?:checkpoint|global_step|step|ckpt|iter|iteration|epoch)s?[-_=]?\d+")
_PREFIX = re.compile(r"(?:checkpoint|weights|global_step|step|ckpt|iter|epoch)[-_=]?\d+.*")
_SIGNS = frozenset(("optimizer.pt", "optimizer.bin", "random_states_0.pkl", ".metadata"))
_OF_TRAINER = frozenset(("training_args.bin", "rng_state.pth", "rng_state_0.pth"))
History = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a whole checkpoint is. ``resumable``: whether it is more than weights.

    ``kind`` says who wrote it, ``tag`` is set for what DeepSpeed can load, ``step`` is ``None``
    where the files do not say. ``history`` is what the Trainer logged until then.
    """

    path: Path
    kind: str
    step: int | None = None
    tag: str | None = None
    resumable: bool = True
    history: History | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None


def is_name(name: str) -> bool:
    """Whether a name is one that trainings give to checkpoints, such as checkpoint-500."""
    return name.endswith(".ckpt") or _PREFIX.fullmatch(name) is not None


def has_signs(path: Path) -> bool:
    """Whether a folder holds, right in it, what only the checkpoint of a training has."""
    names = {entry.name for entry in os.scandir(path)}
    return bool(names & _SIGNS) or any(name.startswith("pytorch_model_fsdp") for name in names)


def candidates(run: Path) -> list[Path]:
    """All in a run's folder that is a checkpoint, whole or not, or may be one, whoever wrote it."""
    try:
        entries = sorted(os.scandir(run), key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(
            f"{run}: {error.strerror}; expected the folder of a run", "incomplete"
        ) from error
    found = []
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            found += [path] if path.suffix == ".ckpt" else []
            continue
        try:
            inside = (path / STATE).exists() or has_signs(path)
        except OSError:  # lost+found, or what was deleted meanwhile
            continue
        if (
            inside
            or _NAME.fullmatch(entry.name)
            or entry.name.endswith(".ckpt")
            or is_checkpoint(path)
        ):
            found.append(path)
    return found


def step_of(path: Path) -> int | None:
    """The step that a checkpoint without a number in its name holds; ``None`` if it cannot be told.

    Nothing is proven by it.
    """
    try:
        if path.is_dir() and (path / STATE).is_file():
            return int(trainer_state(path)["global_step"])
        return _proof(path, None).step if path.is_file() or has_tag(path) else None
    except (CheckpointError, OSError):
        return None


def prove(path: Path, tag: str | None = None) -> Proof:
    """What the checkpoint is, and of several tags in it this one.

    ``CheckpointError`` if it is not whole. Its kind is "unsupported" where nothing here knows such
    files, so that nothing can be said.
    """
    try:
        return _proof(path, tag)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror}", "incomplete"
        ) from error


def _proof(path: Path, tag: str | None) -> Proof:
    if path.is_file():
        return _lightning_file(path)
    names = {entry.name for entry in os.scandir(path)}
    if STATE in names or names & _OF_TRAINER:
        return _of_trainer(path, names)
    if any(re.fullmatch(RANDOM, name) for name in names):
        return _of_accelerate(path, names)
    if has_tag(path):
        return _of_deepspeed(path, "DeepSpeed", tag=tag)
    if ".metadata" in names or any(name.endswith(".metadata") for name in names):
        intact.require_dcp(path)
        lightning = "meta.pt" in names
        if lightning:
            intact.require_torch_file(path / "meta.pt")
        return Proof(path, "Lightning with FSDP" if lightning else "torch's distributed checkpoint")
    return _of_functions(path, names)


def _of_functions(path: Path, names: set[str]) -> Proof:
    """What ``save_fsdp_model`` and ``save_fsdp_optimizer`` of a loop of one's own wrote.

    ``CheckpointError`` for anything else: it is empty, cut short, or of no kind known here.
    """
    sharded = _fsdp_parts(path, "pytorch_model_fsdp")
    if sharded and _fsdp_parts(path, "optimizer") and not is_numbered(path):
        return Proof(path, "FSDP")
    if not names:
        raise CheckpointError(f"{path} is empty: its save did not begin", "incomplete")
    if sharded or intact.WEIGHTS_NAMES & names:
        raise CheckpointError(
            f"{path} has weights, but no {STATE}, which a Trainer writes last, and no "
            "random_states of Accelerate: its save did not finish, or it is a model folder",
            "incomplete",
        )
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"{path} holds files of no kind that is known here ({shown})", "unsupported"
    )


def has_tag(path: Path) -> bool:
    """Whether DeepSpeed's state files lie in the folder, or in one right below it."""
    return is_tag_folder(path) or any(
        is_tag_folder(inner)
        for inner in path.iterdir()
        if inner.is_dir() and not inner.name.startswith(".")
    )


def trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's state; ``CheckpointError`` if it is not there, or cut short."""
    path = folder / STATE
    state = intact.read_json(path)
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{path} is cut short or damaged: global_step is {step!r}")
    return dict(state)


def history_of(folder: Path) -> History | None:
    """What the Trainer had logged at this checkpoint; ``None`` if it is none of a Trainer."""
    if not (folder / STATE).is_file():
        return None
    log = trainer_state(folder).get("log_history")
    return tuple(entry for entry in log if isinstance(entry, dict)) if isinstance(log, list) else ()


def _of_trainer(folder: Path, names: set[str]) -> Proof:
    state = trainer_state(folder)
    step, history = int(state["global_step"]), history_of(folder)
    ranks = intact.require_all_ranks(folder, [folder / name for name in names], RNG)
    ranks = ranks or int("rng_state.pth" in names)
    for name in sorted(names):
        if (folder / name).is_file() and not name.startswith("."):
            intact.require_file(folder / name)
    if has_tag(folder):
        if "optimizer.pt" in names:
            raise CheckpointError(
                f"{folder} holds optimizer.pt and DeepSpeed's files: a training with and one "
                "without DeepSpeed saved into it; move the files of the older one away"
            )
        proof = _of_deepspeed(folder, "the Trainer with DeepSpeed", ranks)
        return Proof(folder, proof.kind, step, proof.tag, True, history, proof.shapes)
    sharded = _fsdp_parts(folder, "pytorch_model_fsdp")
    kind = "the Trainer with FSDP" if sharded else "the Trainer without DeepSpeed"
    if not sharded and not intact.weights(folder):
        raise CheckpointError(f"{folder} has no weights of a model or adapter", "incomplete")
    optimizer = bool(_fsdp_parts(folder, "optimizer")) or "optimizer.pt" in names
    parts = {"optimizer.pt": optimizer, "scheduler.pt": "scheduler.pt" in names}
    parts["rng_state.pth"] = ranks > 0
    if not any(parts.values()):  # save_only_model
        return Proof(folder, kind, step, None, False, history)
    for name, there in parts.items():
        if not there:
            raise CheckpointError(f"{folder} has no {name}", "incomplete")
    return Proof(folder, kind, step, None, True, history)


FSDP_STEMS = ("pytorch_model_fsdp", "optimizer")  # accelerate 1.15 ``utils/fsdp_utils.py``


def _fsdp_parts(folder: Path, stem: str) -> list[Path]:
    """The parts of FSDP's model or optimizer, each whole: folders of DCP, or files."""
    folders = sorted(path for path in folder.glob(f"{stem}_*") if path.is_dir())
    for path in folders:
        intact.require_dcp(path)
    files = sorted(folder.glob(f"{stem}*.bin"))
    intact.require_all_ranks(folder, files, stem + r"_0_rank(\d+)\.bin")
    ranks = {len(list(folder.glob(f"{name}_0_rank*.bin"))) for name in FSDP_STEMS} - {0}
    if len(ranks) > 1:
        raise CheckpointError(
            f"{folder} has {' and '.join(FSDP_STEMS)} of {min(ranks)} and {max(ranks)} ranks",
            "incomplete",
        )
    for path in files:
        intact.require_torch_file(path)
    return [*folders, *files]


def _of_accelerate(folder: Path, names: set[str]) -> Proof:
    intact.require_all_ranks(folder, [folder / name for name in names], RANDOM)
    for name in sorted(names):
        if (folder / name).is_file() and not name.startswith("."):
            intact.require_file(folder / name)
    if has_tag(folder):
        return _of_deepspeed(folder, "Accelerate with DeepSpeed")
    sharded = _fsdp_parts(folder, "pytorch_model_fsdp")
    if not sharded and not intact.weights(folder):
        raise CheckpointError(f"{folder} has no weights of a model", "incomplete")
    if not _fsdp_parts(folder, "optimizer"):
        raise CheckpointError(f"{folder} has no optimizer.bin", "incomplete")
    return Proof(folder, "Accelerate with FSDP" if sharded else "Accelerate without DeepSpeed")


def _of_deepspeed(
    folder: Path, kind: str, ranks: int | None = None, tag: str | None = None
) -> Proof:
    """``ranks``: how many RNG states of a Trainer there are, of which every rank needs one."""
    lightning = folder.name.endswith(".ckpt")
    kind = "Lightning with DeepSpeed" if lightning else kind
    try:
        source = zero.read(folder, tag)
    except CheckpointError as error:
        if error.kind != "unsupported":
            raise
        tag = require_parallel(folder, tag)
        return Proof(folder, f"{kind} (parallel)", step_in(tag), tag)
    if ranks is not None and ranks < source.world_size:
        raise CheckpointError(
            f"{folder} has RNG states of {ranks} ranks, its optimizer state is of "
            f"{source.world_size}",
            "incomplete",
        )
    scheduled = source.model.root.get("lr_scheduler") is not None
    if ranks is not None and not scheduled and not (folder / "scheduler.pt").exists():
        raise CheckpointError(f"{folder} has no scheduler.pt", "incomplete")
    shapes = {name: tuple(ref.shape) for name, ref in source.weights.tensors.items()}
    return Proof(folder, kind, source.step, source.place.tag, shapes=shapes)


def _lightning_file(path: Path) -> Proof:
    root = intact.require_torch_file(path)
    if not isinstance(root, Mapping) or _LIGHTNING not in root:
        raise CheckpointError(f"{path} is no checkpoint of Lightning", "unsupported")
    step = root.get("global_step")
    resumable = "optimizer_states" in root and "loops" in root
    return Proof(path, "Lightning", step if isinstance(step, int) else None, resumable=resumable)
