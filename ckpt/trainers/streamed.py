"""Weights written by all ranks into the folder of a commit that other files are written to."""

from __future__ import annotations

from ckpt.saving.commit import Commit
from ckpt.saving.taking import send
from ckpt.saving.weights import Weights
from ckpt.saving.work import Work


def write(weights: Weights, commit: Commit) -> None:
    """This rank's part, when rank 0 has made the files; every rank calls it.

    Ranks that do not see rank 0's folder send it theirs.
    """
    ranks, folder = commit.ranks, commit.folder
    if commit.nodes.away:
        send(commit, weights)
        return
    work = Work(folder, [], weights)
    work.beat = lambda: ranks.beat(heed=True)
    work.write()
    commit.note = work.report
    commit.join = lambda notes: weights.finish(folder, notes)
