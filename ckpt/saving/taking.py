"""The state of a training, taken down in the middle of it: all that one save will write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.live.job import save_config
from ckpt.saving import extras, preflight
from ckpt.saving.commit import Commit
from ckpt.saving.engine import Taken, put_in
from ckpt.saving.engines import Engines, in_folders
from ckpt.saving.weights import Weights
from ckpt.saving.work import Work
from ckpt.saving.zips import Captured
from converters import files


def take(
    engines: Engines,
    commit: Commit,
    weights: Weights | None,
    client_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    tokenizer: Any = None,
    exclude_frozen_parameters: bool = False,
) -> Work:
    """This rank's part of a save, not yet written but for small files; every rank calls it.

    A full save calls ``save_checkpoint`` of each engine, which communicates; what is written later
    is not waited for in any collective. ``CheckpointError`` on every rank if one fails, or if the
    disk is too small for what all of them are about to write.
    """
    ranks, folder, tag = commit.ranks, commit.folder, commit.facts.tag
    with ranks.step() as step, files.named(folder):
        states = []
        if tag is not None:
            options = {"exclude_frozen_parameters": True} if exclude_frozen_parameters else {}
            states = _captured(engines, folder, tag, client_state, options)
            commit.files |= extras.write(folder, ranks.rank, extra)
        work = Work(folder, states, weights)
        work.beat = lambda: ranks.beat(heed=True)
        step.value = [commit.nodes.folder, work.nbytes]
    preflight.require_room(ranks, commit.nodes, folder, step.heard, weights)
    with ranks.step(), files.named(folder):
        if not ranks.rank:
            beside_all(engines, folder, weights, tokenizer)
    if weights is not None and commit.nodes.away:
        send(commit, weights)
        work.weights = None
    elif weights is not None:
        commit.join = lambda notes: weights.finish(folder, notes)
    return work


def _captured(
    engines: Engines,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[tuple[Path, Captured]]:
    """The states of all engines, taken down; what failed is raised when all are out of it.

    Or else other ranks would wait for this one in the ``save_checkpoint`` of the next engine.
    """
    writers = []
    for name, engine in engines:
        with put_in(engine, Taken) as writer:
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


def beside_all(engines: Engines, folder: Path, weights: Weights | None, tokenizer: Any) -> None:
    """``beside`` for each engine, in its own folder."""
    if not engines.several:
        beside(engines.first.module, folder, weights, tokenizer)
        return
    if weights is not None:
        weights.make(folder)

    def rest(inner: Path, engine: Any) -> None:
        if weights is None:
            beside(engine.module, inner, None)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)

    in_folders(folder, engines, rest)


def beside(module: Any, folder: Path, weights: Weights | None, tokenizer: Any = None) -> None:
    """What makes the folder a model's, whether the weights are in it or still to be converted."""
    if weights is not None:
        weights.make(folder)
    elif not hasattr(module, "peft_config"):
        save_config(module, folder, None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def send(commit: Commit, weights: Weights) -> None:
    """Weights to rank 0 from ranks that do not see its folder, at once; every rank calls it."""
    reports = weights.send(commit.folder, list(commit.nodes.away))
    with commit.ranks.step():
        if not commit.ranks.rank:
            commit.files |= weights.finish(commit.folder, reports)
