"""Whether what was written without ckpt
is a whole checkpoint that a training can go on from.

Nobody said that its save finished. So each kind is judged by what its writer writes,
and in which order, without torch and without running a pickle:

    the Trainer                  weights, optimizer.pt, scheduler.pt, RNG states of all ranks, and
                                 trainer_state.json last (transformers 5.23 ``trainer.py``:
                                 ``_save_checkpoint``)
    the Trainer with FSDP        pytorch_model_fsdp_0/ and optimizer_0/, or the .bin of that name
                                 (accelerate 1.15 ``utils/fsdp_utils.py``)
    DeepSpeed, in any of these   the state files of a tag, as ``detect.read`` has them
    Accelerate's save_state      weights, optimizer.bin, random_states_R.pkl (accelerate 1.15
                                 ``checkpointing.py``: ``save_accelerator_state``)
    Lightning                    X.ckpt: a zip, or a folder of DeepSpeed or FSDP (lightning 2.6.6)
    torch's DCP                  .metadata and what it describes
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import filterfalse
from pathlib import Path

from ckpt.folders.filenames import CONVERSION, MANIFEST
from ckpt.runs.ancestry import record_in
from ckpt.runs.conversions import conversion_in
from ckpt.runs.foreign import histories, intact_files, signs, step_records
from ckpt.runs.foreign.proofs import MODEL, OWN, PLAIN_DEEPSPEED, History, Proof, shapes_of
from ckpt.runs.run import step_in
from converters import detect
from converters.detect import filenames, state_folders
from converters.detect.deepspeed import PARALLEL, UNIVERSAL
from converters.errors import CheckpointError, unreadable
from converters.lazy_pattern import LazyPattern
from converters.source import Source
from converters.storage import open_files
from converters.words import counted
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.discovery import is_tag_folder

STATE = filenames.TRAINER_STATE
RANDOM = filenames.RANDOM_STATES.pattern
_LIGHTNING = "pytorch-lightning_version"
_UNIVERSAL = "it is a universal checkpoint: ckpt from-universal makes native files of it"
_CONFIGS = frozenset(("config.json", "adapter_config.json"))
_STATES = LazyPattern(r"(optimizer|scheduler|scaler|sampler|dl_state_dict|custom_checkpoint).*")
_OF_TRAINER = frozenset(("training_args.bin", "rng_state.pth", "rng_state_0.pth"))


@dataclass(frozen=True, slots=True)
class _TrainerFiles:
    """The files of a Trainer beside DeepSpeed's: its step,
    and RNG states of so many ranks."""

    step: int
    rng_ranks: int


def step_of(path: Path) -> int | None:
    """The step that a checkpoint without a number in its name holds; ``None`` if it
    cannot be told.

    Nothing is proven by it.
    """
    try:
        if path.is_dir() and (path / STATE).is_file():
            return histories.stated_step(path)
        return _proof(path, None).step if path.is_file() or has_tag(path) else None
    except (CheckpointError, OSError):
        return None


@open_files.once()
def prove(path: Path, tag: str | None = None, *, compares_values: bool = False) -> Proof:
    """Proves the checkpoint, or of several tags in it the one that is named.

    With ``compares_values`` the model file of DeepSpeed has to be of the save of its
    states, by a sample of both. ``CheckpointError`` if it is not whole. Its kind is
    "unsupported" where nothing here knows such files, so that nothing can be said.
    """
    try:
        proof = _proof(path, tag)
        if compares_values and proof.source is not None:
            _require_own_model(path, proof.source)
        is_own = path.is_dir() and record_in(path) is not None
    except OSError as error:
        raise unreadable(error, path) from error
    except CheckpointError as error:
        from ckpt.runs.foreign import torn

        torn.require_all_nodes(error, path)
        raise

    return replace(proof, kind=OWN if is_own else proof.kind, source=None)


def _require_own_model(path: Path, source: Source) -> None:
    """``CheckpointError`` where the weights
    of the model file are not those of the states."""
    from ckpt.runs.foreign import overwriting, value_samples

    try:
        value_samples.require_alike(source, path)
    except CheckpointError:
        overwriting.require_one_save(path, source.place.tag)  # says more where times speak too
        raise


def _proof(path: Path, tag: str | None) -> Proof:
    if path.is_file():
        return _lightning_file(path)

    entry_names = {entry.name for entry in os.scandir(path)}
    _require_named_tag(path, entry_names)
    if STATE in entry_names or entry_names & _OF_TRAINER:
        return _of_trainer(path, entry_names)
    if any(re.fullmatch(RANDOM, entry_name) for entry_name in entry_names):
        return _of_accelerate(path, entry_names)
    if has_tag(path):
        return _of_deepspeed(path, PLAIN_DEEPSPEED, tag=tag)
    if any(entry_name.endswith((".metadata", ".distcp")) for entry_name in entry_names):
        from ckpt.runs.foreign import dcp_files

        return dcp_files.proof_of(path)

    return _of_functions(path, entry_names)


def _require_named_tag(path: Path, entry_names: set[str]) -> None:
    """``CheckpointError`` where DeepSpeed's ``latest`` names a folder that is not there,
    and no other one is: all of its files were left behind, or deleted."""
    if filenames.LATEST not in entry_names or has_tag(path):
        return

    tag_name = state_folders.tag_in(path / filenames.LATEST)
    damage = detect.detect(path).damage
    if tag_name is not None and damage is not None and not (path / tag_name).is_dir():
        raise damage


def _of_functions(path: Path, entry_names: set[str]) -> Proof:
    """What ``save_fsdp_model`` and ``save_fsdp_optimizer``
    of a loop of one's own wrote, or ``save_pretrained``.

    ``CheckpointError`` for anything else: it is empty, cut short, or of no kind known
    here.
    """
    from ckpt.runs.foreign import dcp_files

    proof = dcp_files.proof_of_parts(path) or dcp_files.proof_of_pair(path)
    if proof is not None:
        return proof
    if not entry_names:
        raise CheckpointError(f"{path} is empty: its save did not begin", "incomplete")

    has_states = any(map(_STATES.fullmatch, entry_names))
    conversion = conversion_in(path)
    if CONVERSION in entry_names:
        intact_files.read_json(path / CONVERSION)  # may have been cut short
    is_model = conversion is not None or entry_names & _CONFIGS
    if not has_states and is_model and intact_files.weights(path):
        if conversion is not None:
            return Proof(path, OWN, conversion.step, resumable=False)
        return Proof(path, MODEL, step_in(path.name), resumable=False)
    if intact_files.WEIGHTS_NAMES & entry_names:
        raise CheckpointError(
            f"{path} {detect.detect(path).statement}, but has no {STATE}, which a Trainer writes "
            "last, and no random_states of Accelerate: its save did not finish, or no training "
            "goes on from it",
            "incomplete",
        )

    if (detection := detect.detect(path)).kind.name != "unknown":
        raise detection.damage or CheckpointError(str(detection.error), "unsupported")

    first_names = ", ".join(sorted(entry_names)[:3])
    raise CheckpointError(
        f"{path} holds files of a kind that ckpt does not know ({first_names})",
        "unsupported",
    )


def _is_tools_own(name: str) -> bool:
    """Whether no writer of checkpoints wrote a file: a hidden one, or a manifest, whose
    damage says nothing of the rest."""
    return name.startswith(".") or name == MANIFEST


def has_tag(path: Path) -> bool:
    """Whether DeepSpeed's state files lie in the folder, or in one right below it."""
    return is_tag_folder(path) or any(
        is_tag_folder(subfolder)
        for subfolder in path.iterdir()
        if subfolder.is_dir() and not subfolder.name.startswith(".")
    )


def _of_trainer(folder: Path, entry_names: set[str]) -> Proof:
    if signs.is_saved_model(folder):
        raise CheckpointError(
            f"{folder} holds a state of the engine alone (of trainer.save_model()), from which the "
            "Trainer cannot go on: ckpt.resume of a loop of your own takes its tag by name; name "
            "another folder to begin a new training",
            "incomplete",
        )
    if STATE not in entry_names:
        raise CheckpointError(
            f"{folder} has no {STATE}, which the Trainer writes last: its save did not finish",
            "incomplete",
        )

    step, history = histories.stated_step(folder), histories.history_of(folder)
    rng_ranks = intact_files.require_rng_ranks(folder, entry_names)
    intact_files.require_files(folder, filterfalse(_is_tools_own, entry_names), has_tag(folder))

    if has_tag(folder):
        if "optimizer.pt" in entry_names:
            raise CheckpointError(
                f"{folder} holds optimizer.pt and DeepSpeed's files: a training with "
                "and one without DeepSpeed saved into it; move the files of the older "
                "one away"
            )

        trainer_files = _TrainerFiles(step, rng_ranks)
        proof = _of_deepspeed(folder, "the Trainer with DeepSpeed", trainer_files)
        if proof.hindrance is not None:
            return replace(proof, history=history)
        return replace(proof, step=step, history=history)

    return _of_plain_trainer(folder, entry_names, step, history, rng_ranks)


def _of_plain_trainer(
    folder: Path, entry_names: set[str], step: int, history: History | None, rng_ranks: int
) -> Proof:
    """The Trainer without DeepSpeed: what it goes on from is whole, or not there at all."""
    from ckpt.runs.foreign import dcp_files

    model_parts = dcp_files.fsdp_parts(folder, "pytorch_model_fsdp")
    kind = "the Trainer with FSDP" if model_parts else "the Trainer without DeepSpeed"
    if not model_parts and not intact_files.weights(folder):
        raise CheckpointError(
            f"{folder} has no weights of a model or adapter",
            "incomplete",
        )
    step_records.require_own_weights(folder, step)

    optimizer_parts = dcp_files.fsdp_parts(folder, "optimizer")
    required_parts = {
        _optimizer_name(folder, "optimizer.pt"): bool(optimizer_parts)
        or "optimizer.pt" in entry_names,
        "scheduler.pt": "scheduler.pt" in entry_names,
        "rng_state.pth": rng_ranks > 0,
    }
    if not any(required_parts.values()):  # save_only_model
        return Proof(folder, kind, step, None, False, history)

    for name, is_present in required_parts.items():
        if not is_present:
            raise CheckpointError(f"{folder} has no {name}", "incomplete")

    step_records.require_one_step(folder, step)
    return Proof(folder, kind, step, None, True, history)


def _optimizer_name(folder: Path, own_name: str) -> str:
    """What the optimizer beside a model is called: of FSDP's parts a folder
    (accelerate 1.15 ``utils/fsdp_utils.py``: ``save_fsdp_optimizer``)."""
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return "optimizer_0"
    return "optimizer.bin" if (folder / "pytorch_model_fsdp.bin").is_file() else own_name


def _of_accelerate(folder: Path, entry_names: set[str]) -> Proof:
    paths = [folder / entry_name for entry_name in entry_names]
    random_ranks = intact_files.require_all_ranks(folder, paths, RANDOM)
    intact_files.require_files(folder, filterfalse(_is_tools_own, entry_names), has_tag(folder))

    if has_tag(folder):
        proof = _of_deepspeed(folder, "Accelerate with DeepSpeed")
        world_size = proof.source.world_size if proof.source is not None else 0
        doubt = intact_files.doubt_about_ranks(folder, random_ranks, world_size)
        return replace(proof, remark=doubt)

    from ckpt.runs.foreign import dcp_files

    model_parts = dcp_files.fsdp_parts(folder, "pytorch_model_fsdp")
    if not model_parts and not intact_files.weights(folder):
        raise CheckpointError(f"{folder} has no weights of a model", "incomplete")
    optimizer_parts = dcp_files.fsdp_parts(folder, "optimizer")
    if not optimizer_parts:
        name = _optimizer_name(folder, "optimizer.bin")
        raise CheckpointError(f"{folder} has no {name}", "incomplete")

    kind = "Accelerate with FSDP" if model_parts else "Accelerate without DeepSpeed"
    rank_count = dcp_files.rank_count([*model_parts, *optimizer_parts])
    doubt = intact_files.doubt_about_ranks(folder, random_ranks, rank_count)
    return Proof(folder, kind, remark=doubt)


def _of_deepspeed(
    folder: Path, kind: str, trainer_files: _TrainerFiles | None = None, tag: str | None = None
) -> Proof:
    try:
        source = detect.read(folder, tag, complete=True)
    except CheckpointError as error:
        if error.kind != "unsupported":
            raise
        source = None
    if kind == PLAIN_DEEPSPEED and _is_lightnings(folder, source):
        kind = "Lightning with DeepSpeed"
    if source is None or source.kind in PARALLEL:
        from ckpt.runs.foreign import parallel

        if source is not None and trainer_files is not None:
            _require_trainers(folder, trainer_files, source)
        return parallel.prove(folder, kind, source, tag)
    if source.kind == UNIVERSAL:
        return Proof(
            folder, "DeepSpeed (universal)", source.step, None, False, hindrance=_UNIVERSAL
        )

    checkpoint = source if isinstance(source, Checkpoint) else None
    if checkpoint is not None:
        step_records.require_one_save(checkpoint)
    if trainer_files is not None:
        _require_trainers(folder, trainer_files, source)
        step_records.require_one_step(folder, trainer_files.step, checkpoint)

    shapes = shapes_of(source) if source.kind == "deepspeed" else None  # others have parts
    proof = Proof(folder, kind, source.step, source.place.tag, shapes=shapes)
    return replace(proof, source=checkpoint)


def _is_lightnings(folder: Path, source: Source | None) -> bool:
    """Whether Lightning saved with DeepSpeed: by what it stores or, where that is not
    read, by the name that it gives."""
    return folder.name.endswith(".ckpt") or (source is not None and _LIGHTNING in source.entries)


def _require_trainers(folder: Path, trainer_files: _TrainerFiles, source: Source) -> None:
    """``CheckpointError`` unless every rank has its RNG state, and there is a scheduler."""
    if trainer_files.rng_ranks < source.world_size:
        raise CheckpointError(
            f"{folder} has RNG states of {counted(trainer_files.rng_ranks, 'rank')}, its optimizer "
            f"state is of {source.world_size}",
            "incomplete",
        )

    has_scheduler = source.entries.get("lr_scheduler") is not None
    if not has_scheduler and not (folder / "scheduler.pt").exists():
        raise CheckpointError(f"{folder} has no scheduler.pt", "incomplete")


def _lightning_file(path: Path) -> Proof:
    saved_object = intact_files.require_torch_file(path)
    if not isinstance(saved_object, Mapping) or _LIGHTNING not in saved_object:
        raise CheckpointError(f"{path} is not a checkpoint of Lightning", "unsupported")

    global_step = saved_object.get("global_step")
    step = global_step if isinstance(global_step, int) else None
    resumable = "optimizer_states" in saved_object and "loops" in saved_object
    return Proof(path, "Lightning", step, resumable=resumable)
