"""What a training goes on from: a checkpoint of a topology, and what each rank saved beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt.runs import engines, lineage, manifest
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Checkpoint
from ckpt.saving import extras, plain, rng
from ckpt.saving.layout import Topology
from ckpt.saving.progress import whole_micro_steps
from converters import zero
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class Source:
    """What is loaded. ``foreign``: without a manifest; then ``digest`` is empty.

    ``resharded``: it was made of what was asked for.
    """

    folder: Path
    tag: str
    step: int
    topology: Topology
    digest: str = ""
    progress: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] | None = None
    manifest: Manifest | None = None
    resharded: bool = False

    @property
    def foreign(self) -> bool:
        """Whether ckpt did not write it."""
        return not self.digest

    @property
    def saved_by_ckpt(self) -> bool:
        """Whether a training saved it with ckpt; one that ``doctor --adopt`` committed was not."""
        return self.manifest is not None and "torch" in self.manifest.versions

    def said(self, verified: str) -> str:
        """What it is, as a line."""
        proof = f"manifest {self.digest}, {verified} verified" if self.digest else "no manifest"
        run = f", {lineage.shown(self.manifest.run)}" if self.manifest else ""
        line = f"{self.folder}: step {self.step}, tag {self.tag}{run}, {proof}"
        metrics = [f"{name} {value:g}" for name, value in (self.metrics or {}).items()]
        return "; ".join([line, *metrics[:3]])

    def go_on(self, engine: Any, batch: Mapping[str, Any]) -> None:
        """Sets what DeepSpeed does not load: micro steps, as of the last whole step.

        ``batch`` is a part of the engine's settings.
        """
        micro = whole_micro_steps(self.progress or {}, batch)
        if micro is not None and hasattr(engine, "micro_steps"):
            engine.micro_steps = micro

    @classmethod
    def of(cls, found: Checkpoint, tag: str | None = None) -> Source:
        """By its manifest, or by what its state files say; raises as ``zero.read`` does."""
        held = found.manifest
        if held is None:
            named = tag if tag is not None and (found.folder / tag).is_dir() else None
            read = zero.read(found.folder, named)
            topology = Topology(read.stage, read.world_size)
            step = read.step if read.step is not None else found.step or 0
            folder = read.place.folder
            return cls(folder.parent, folder.name, step, topology)
        if several := engines.names(held):
            raise CheckpointError(
                f"{found.folder} has the engines {', '.join(several)}, resume was given one; give "
                "it all of them by name, as they were given to Saver",
                "refused",
            )
        data = (found.folder / manifest.NAME).read_bytes()
        topology = Topology(held.stage or 0, held.world_size)
        digest = sha256(data).hexdigest()[:12]
        assert held.tag is not None
        noted = (held.progress, held.metrics, held)
        return cls(found.folder, held.tag, held.step, topology, digest, *noted)


@dataclass(slots=True)
class State:
    """What this rank saved beside the engine's state; ``random`` is ``None`` if it is not there."""

    random: Any
    extra: dict[str, Any]
    wanted: bool = True

    @classmethod
    def none(cls) -> State:
        """Nothing is to be set."""
        return cls(None, {}, False)

    @classmethod
    def read(cls, source: Source, rank: int) -> State:
        """As ``extras.write`` wrote it; ``CheckpointError`` if a file is damaged."""
        random = source.folder / rng.NAME.format(rank)
        extra = source.folder / extras.EXTRA.format(rank)
        return cls(
            plain.loads(random) if random.exists() else None,
            plain.loads(extra) if extra.exists() else {},
        )

    def lost(self, extra: Mapping[str, Any] | None) -> list[str]:
        """A line for each thing that does not come back."""
        if not self.wanted:
            return []
        given = set(extra or {})
        found = [] if self.random is not None else ["it has no random states of this rank"]
        for name in sorted(given - set(self.extra)):
            found.append(f"extra {name} was not saved")
        for name in sorted(set(self.extra) - given):
            found.append(f"extra {name} was saved, and is not given to be set")
        return found

    def set(self, extra: Mapping[str, Any] | None) -> None:
        """Gives each object its state and, last, sets the random generators."""
        for name, held in (extra or {}).items() if self.wanted else ():
            if name in self.extra:
                held.load_state_dict(self.extra[name])
        if self.random is not None:
            for absent in rng.restore(self.random):
                log.warning("not set: %s", absent)
