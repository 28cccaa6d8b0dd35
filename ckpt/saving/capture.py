"""The state of a training, taken down in the middle of it: all that one save will write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ckpt.engine.view import EngineView
from ckpt.live.export import save_config
from ckpt.saving import preflight
from ckpt.saving.commit.commit import Commit
from ckpt.saving.engines import Engines, in_folders
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.rank_work import RankWork
from ckpt.state import rank_files
from ckpt.state.state_file import StateFile
from ckpt.state.torch_file import Captured
from converters.storage import local


def capture(
    engines: Engines,
    commit: Commit,
    weights: WeightsWriter | None,
    client_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    tokenizer: Any = None,
    exclude_frozen_parameters: bool = False,
) -> RankWork:
    """This rank's part of a save,
    not yet written but for small files; every rank calls it.

    A full save calls ``save_checkpoint`` of each engine, which communicates; what is
    written later is not waited for in any collective. ``CheckpointError`` on every rank
    if one fails, or if the disk is too small for what all of them are about to write.
    """
    ranks, folder, tag = commit.ranks, commit.folder, commit.facts.tag
    weight_bytes = 0 if weights is None else weights.nbytes
    with ranks.step() as step, local.naming_path(folder):
        states: list[tuple[Path, StateFile]] = []
        if tag is not None:
            options = {}
            if exclude_frozen_parameters:
                options["exclude_frozen_parameters"] = True
            states += _capture_states(engines, folder, tag, client_state, options)
            states += rank_files.capture(folder, ranks.rank, extra)

        work = RankWork(folder, states, weights)
        work.heartbeat = lambda: ranks.heartbeat(raise_failures=True)
        step.value = preflight.room_report(commit.nodes, folder, work.nbytes)
        step.answer = partial(preflight.require_room, weight_bytes=weight_bytes)

    with ranks.step(), local.naming_path(folder):
        if not ranks.rank:
            write_all_companions(engines, folder, weights, tokenizer)

    if weights is not None and commit.nodes.away:
        send(commit, weights)
        work.weights = None
    elif weights is not None:
        commit.join = lambda notes: weights.finish(folder, notes)

    return work


def _capture_states(
    engines: Engines,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[tuple[Path, Captured]]:
    """The states of all engines, taken down;
    what failed is raised when all are out of it.

    Or else other ranks would wait for this one in the ``save_checkpoint`` of the next
    engine.
    """
    from ckpt.engine.checkpoint_engine import CapturingEngine, installed

    writers = []
    for name, engine in engines:
        with installed(engine, CapturingEngine) as writer:
            writers.append(writer)
            engine.save_checkpoint(
                str(folder / name),
                tag=tag.rpartition("/")[2],
                client_state=dict(client_state),
                save_latest=False,
                **options,
            )

    for writer in writers:
        writer.require()
    return [state for writer in writers for state in writer.captured]


def write_all_companions(
    engines: Engines,
    folder: Path,
    weights: WeightsWriter | None,
    tokenizer: Any,
) -> None:
    """``write_companions`` for each engine, in its own folder."""
    if not engines.several:
        write_companions(engines.first.module, folder, weights, tokenizer)
        return

    if weights is not None:
        weights.make(folder)

    def write_beside(engine_folder: Path, engine: EngineView) -> None:
        if weights is None:
            write_companions(engine.module, engine_folder, None)
        if tokenizer is not None:
            tokenizer.save_pretrained(engine_folder)

    in_folders(folder, engines, write_beside)


def write_companions(
    module: Any,
    folder: Path,
    weights: WeightsWriter | None,
    tokenizer: Any = None,
) -> None:
    """Writes the files that make the folder a model's, whether the weights are in it or
    still to be converted."""
    if weights is not None:
        weights.make(folder)
    elif not hasattr(module, "peft_config"):
        save_config(module, folder, None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_small_files(engines: Engines, tokenizer: Any, folder: Path, rank: int) -> None:
    """Writes what rank 0 writes beside states and weights, to see how much that is."""
    if not rank:
        write_all_companions(engines, folder, None, tokenizer)


def send(commit: Commit, weights: WeightsWriter) -> None:
    """Weights to rank 0 from ranks that do not see its folder,
    at once; every rank calls it."""
    reports = weights.send(commit.folder, list(commit.nodes.away))
    with commit.ranks.step():
        if not commit.ranks.rank:
            commit.files |= weights.finish(commit.folder, reports)
