"""Whose checkpoints these are: the run that saved them, and the line of launches that led to each.

A folder can hold checkpoints of several trainings. Each training has an id, ``run``,
from its first save on, which every resume carries over. Each launch of it (a start of
the script that saves) has an id, too. ``line`` in a manifest is the launches that led
to that checkpoint, in order, each with the last step of it that counts:

    launch a   100   200   300   400        line of 400: a up to 400
                       \\
    launch b            250   300           line of 300: a up to 200, b up to 300

b went back to step 200, so a's 300 and 400 are of the same run but not of b's line:
they are given up. Retention counts the checkpoints of one line, ``latest`` names the
newest of one, and a resume takes that. The line that saved last is the one that counts.

Manifests of older versions have no ids. They are one run, without a name, in a single
line.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckpt.runs.manifest import Manifest

UNNAMED = ""  # stands for the launches of manifests without ids
SHOWN = 6  # digits of an id in messages and tables


@dataclass(frozen=True, slots=True)
class Line:
    """The launches of ``run`` that lead to where a training is;
    the last one is still saving.

    ``ancestors``: earlier launches, each with the last step of it that counts.
    ``launch``: the last. ``run`` is ``None`` for checkpoints of older versions.
    """

    run: str | None
    launch: str
    ancestors: tuple[tuple[str, int], ...] = ()

    @classmethod
    def begin(cls) -> Line:
        """The line of a training that starts from nothing."""
        return cls(uuid.uuid4().hex, uuid.uuid4().hex)

    @classmethod
    def go_on(cls, source: Manifest | None, step: int) -> Line:
        """The line of a training that resumed at ``step`` from ``source``;
        ``None`` has no ids."""
        line = source.line if source is not None and source.line else ((UNNAMED, step),)
        run = source.run if source is not None else None
        if run is None:
            run = uuid.uuid4().hex

        ancestors = (*line[:-1], (line[-1][0], step))
        return cls(run, uuid.uuid4().hex, ancestors)

    @classmethod
    def of(cls, checkpoint: Manifest) -> Line:
        """The line that saved a checkpoint."""
        if not checkpoint.line:
            return cls(checkpoint.run, UNNAMED)
        return cls(checkpoint.run, checkpoint.line[-1][0], checkpoint.line[:-1])

    def at(self, step: int) -> tuple[tuple[str, int], ...]:
        """The ``line`` of a manifest that this launch saves at ``step``."""
        return (*self.ancestors, (self.launch, step))

    def has(self, checkpoint: Manifest) -> bool:
        """Whether a checkpoint is of this line: saved by this launch,
        or before it went on."""
        saved_by = _launch(checkpoint)
        if saved_by == self.launch:
            return checkpoint.run == self.run

        if saved_by != UNNAMED and checkpoint.run != self.run:
            return False

        return any(
            saved_by == launch and checkpoint.step <= last_step
            for launch, last_step in self.ancestors
        )


def current(manifests: Iterable[Manifest]) -> Line | None:
    """The line that saved last; ``None`` if there is none.

    A launch that went on from another comes after it, whatever the clocks of their
    machines said. Of launches that know nothing of each other, the one with the latest
    time in its manifests, which copying a run does not change.
    """
    all_manifests = list(manifests)
    saved_manifests = [manifest for manifest in all_manifests if not manifest.is_derived]
    counting_manifests = saved_manifests or all_manifests
    superseded_launches = {
        launch_name for manifest in counting_manifests for launch_name, _ in manifest.line[:-1]
    }
    leading_manifests = [
        manifest for manifest in counting_manifests if _launch(manifest) not in superseded_launches
    ] or counting_manifests
    newest = max(
        leading_manifests,
        key=lambda manifest: (manifest.created, manifest.step),
        default=None,
    )

    return None if newest is None else Line.of(newest)


def _launch(checkpoint: Manifest) -> str:
    return checkpoint.line[-1][0] if checkpoint.line else UNNAMED


def shown(run: str | None) -> str:
    """The id of a run as messages have it."""
    return f"run {run[:SHOWN]}" if run else "a run without an id"


def described(checkpoints: Sequence[tuple[str, str | None]], own_run: str | None = None) -> str:
    """Names of checkpoints, each with its run,
    as a phrase: which there are of which run.

    Those of ``own_run``, which goes on, are what it gave up when it went back.
    """
    groups: dict[str | None, list[str]] = {}
    for checkpoint_name, run_id in checkpoints:
        groups.setdefault(run_id, []).append(checkpoint_name)

    return "; ".join(
        f"{listed(names)}, given up when {shown(run_id)} went back to an earlier step"
        if run_id is not None and run_id == own_run
        else f"{listed(names)} of {shown(run_id)}"
        for run_id, names in groups.items()
    )


def listed(names: Sequence[str], max_names: int = 4) -> str:
    """Names as a phrase: the first ones and how many,
    where there are more than ``max_names``."""
    if len(names) > max_names:
        return f"{', '.join(names[:2])}, ... {names[-1]} ({len(names)} checkpoints)"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
