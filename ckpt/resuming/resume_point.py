"""The point that a training goes on from: a checkpoint of a topology, and what each
rank saved beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.engine.layout import Topology
from ckpt.engine.progress import whole_micro_steps
from ckpt.engine.view import EngineView, set_micro_steps
from ckpt.folders import filenames
from ckpt.runs import engines, lineage
from ckpt.runs.checkpoint_folder import WEIGHTS_ONLY
from ckpt.runs.manifest import Manifest
from ckpt.runs.run import Run, RunCheckpoint, bytes_under, is_numbered
from ckpt.state import plain, rank_files, rng
from converters import detect, options
from converters.accessors import is_whole_number
from converters.detect import sharded
from converters.detect.kind import DEEPSPEED
from converters.errors import CheckpointError
from converters.options import TP, TP_RULES, WORLD_SIZE
from converters.source import Place
from converters.words import shell_word
from converters.zero.files.discovery import is_tag_folder
from converters.zero.merging import saved_degrees
from converters.zero.merging.saved_degrees import Degrees
from converters.zero.model_ranks import folder_files
from converters.zero.parallel.cut_table import UnknownCutsError

if TYPE_CHECKING:
    from ckpt.distributed.ranks import RankGroup

log = logging.getLogger("ckpt")
NO_RANDOM_STATES = "it has no random states of this rank"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The checkpoint that is loaded. ``foreign``:
    without a manifest; then ``digest`` is empty.

    ``folder`` holds the ``tag``; ``choice`` is the checkpoint that was chosen, which may
    be the tag itself. ``resharded``: it was made of what was asked for.
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
    choice: Path | None = None

    @property
    def foreign(self) -> bool:
        """Whether the checkpoint was written without ckpt."""
        return not self.digest

    @property
    def nbytes(self) -> int:
        """Bytes of the files of the checkpoint."""
        if self.manifest is None:
            return bytes_under(self.folder / self.tag)
        return sum(file.size for file in self.manifest.files.values())

    @property
    def saved_by_ckpt(self) -> bool:
        """Whether a training saved it with ckpt;
        one that ``doctor --adopt`` committed was not."""
        return self.manifest is not None and "torch" in self.manifest.versions

    def require_loadable(self, current: Topology) -> None:
        """``CheckpointError`` for a node's part
        that this training does not load from it alone."""
        nodes = 1 if self.manifest is None else self.manifest.nodes
        if self.manifest is None or nodes == 1 or current.loads_parts:
            return
        raise CheckpointError(
            f"{self.folder} is the part of node {self.manifest.node} of {nodes}, and of a "
            "training with tensor parallelism, a pipeline or experts DeepSpeed does not load it "
            "without the others; join the parts with ckpt collect, and give each node all of it "
            "in place of its part",
            "unsupported",
        )

    def said(self, verified: str) -> str:
        """The checkpoint as a line for a reader."""
        proof = "no manifest"
        if self.digest:
            proof = f"manifest {self.digest}, {verified} verified"
        run = f", {lineage.shown(self.manifest.run)}" if self.manifest else ""
        tag = f", tag {self.tag}" if self.tag else ""
        line = f"{self.folder}: step {self.step}{tag}{run}, {proof}"
        metrics = [f"{name} {value:g}" for name, value in (self.metrics or {}).items()]
        return "; ".join([line, *metrics[:3]])

    @property
    def is_pipeline(self) -> bool:
        """Whether it is of a pipeline, as several stages or the files of layers tell."""
        tag_folder = self.folder / self.tag
        if self.topology.degrees.stages > 1 or not tag_folder.is_dir():
            return self.topology.degrees.stages > 1
        return bool(folder_files.scan(Place(self.folder, tag_folder, self.tag)).layers)

    def go_on(self, engine: EngineView, batch: Mapping[str, Any]) -> None:
        """Sets what DeepSpeed does not load: micro steps, as of the last whole step.

        ``batch`` is a part of the engine's settings.
        """
        micro_steps = whole_micro_steps(self.progress or {}, batch)
        if micro_steps is not None:
            set_micro_steps(engine, micro_steps)

    @classmethod
    def of(cls, run_checkpoint: RunCheckpoint, tag: str | None = None) -> ResumePoint:
        """A checkpoint,
        by its manifest or its state files; raises as ``detect.read``."""
        manifest = run_checkpoint.manifest
        if manifest is None:
            return cls._uncommitted(run_checkpoint, tag)

        if engine_names := engines.names(manifest):
            raise CheckpointError(
                f"{run_checkpoint.folder} has the engines {', '.join(engine_names)}, "
                "resume was given one; give it all of them by name, as they were "
                "given to Saver",
                "refused",
            )

        folder = run_checkpoint.folder
        tag = _tag_of(folder, manifest)
        data = (folder / filenames.MANIFEST).read_bytes()
        digest = sha256(data).hexdigest()[:12]
        degrees = _recorded_degrees(manifest)
        if manifest.nodes == 1:
            degrees = saved_degrees.of_place(Place(folder, folder / tag, tag))
        topology = Topology(manifest.stage or 0, manifest.world_size, degrees)
        record = (manifest.progress, manifest.metrics, manifest)

        return cls(folder, tag, manifest.step, topology, digest, *record)

    @classmethod
    def on_all_ranks(
        cls, ranks: RankGroup, run_checkpoint: RunCheckpoint, tag: str | None = None
    ) -> ResumePoint:
        """The same, which every rank calls.

        State files are read by rank 0 alone, which tells the others what they say: all
        ranks see the same files (``agreement``).
        """
        is_reader = run_checkpoint.manifest is not None or not ranks.rank
        with ranks.step() as points:
            source = cls.of(run_checkpoint, tag) if is_reader else None
            if source is not None and source.foreign:
                points.value = source._fields()

        return cls._parse(points.heard[0], run_checkpoint) if source is None else source

    def _fields(self) -> list[Any]:
        """One without a manifest as JSON has it: paths relative to what was chosen."""
        degrees = self.topology.degrees
        folder = os.path.relpath(self.folder, self.choice)
        topology = [self.topology.stage, self.topology.world_size]
        counts = [degrees.tensor_ranks, degrees.stages, degrees.expert_ranks]
        return [folder, self.tag, self.step, topology, counts]

    @classmethod
    def _parse(cls, value: list[Any], run_checkpoint: RunCheckpoint) -> ResumePoint:
        """The value that ``_fields`` of rank 0 returned, of this rank's own path."""
        folder, tag, step, (stage, world_size), (tensor_ranks, stages, expert_ranks) = value
        ranks_of_experts = None if expert_ranks is None else tuple(expert_ranks)
        degrees = Degrees(tensor_ranks, stages, ranks_of_experts)
        choice = run_checkpoint.folder
        path = Path(os.path.normpath(choice / folder))
        return cls(path, tag, step, Topology(stage, world_size, degrees), choice=choice)

    @classmethod
    def _uncommitted(cls, run_checkpoint: RunCheckpoint, tag: str | None) -> ResumePoint:
        """One without a manifest, by its state files."""
        has_tag = tag is not None and (run_checkpoint.folder / tag).is_dir()
        inner_tag = tag if has_tag else None
        try:
            zero_checkpoint = detect.read(run_checkpoint.folder, inner_tag, complete=True)
        except UnknownCutsError as error:
            raise _unknown_cuts(run_checkpoint.folder) from error
        if zero_checkpoint.kind in sharded.READ:
            raise detect.detect(run_checkpoint.folder).unlike(DEEPSPEED)

        degrees = saved_degrees.of_place(zero_checkpoint.place)
        topology = Topology(zero_checkpoint.stage or 0, zero_checkpoint.world_size, degrees)
        step = zero_checkpoint.step
        if step is None:
            step = run_checkpoint.step or 0
        folder = zero_checkpoint.place.folder
        choice = run_checkpoint.folder
        return cls(folder.parent, folder.name, step, topology, choice=choice)


def _unknown_cuts(folder: Path) -> CheckpointError:
    """The error for tensor-parallel ranks of a checkpoint without a manifest."""
    with options.using(options.of_commands, overrides=True):
        command = (
            f"ckpt reshard {shell_word(folder)} {WORLD_SIZE('N')} {TP('N')} {TP_RULES('FILE')}"
        )
    return CheckpointError(
        f"{folder}: nothing in it says how its tensor-parallel ranks cut parameters, so that ckpt "
        "does not resume from it without a manifest; load it with engine.load_checkpoint on the "
        f"ranks that saved it, or for others run: {command} (without the file it prints what to "
        "write into that), and resume from the result by name",
        "unsupported",
    )


def _recorded_degrees(manifest: Manifest) -> Degrees:
    """The degrees by the settings of the training: a node's part of a checkpoint lacks
    files of other ranks, so that its files do not say them."""
    settings = (manifest.progress or {}).get("settings")
    topology = settings.get("topology") if isinstance(settings, Mapping) else None
    values = topology if isinstance(topology, Mapping) else {}
    counts = [values.get(f"{kind}_parallel") for kind in ("tensor", "pipeline")]
    tensor_ranks, stages = (count if is_whole_number(count, 1) else 1 for count in counts)
    return Degrees(tensor_ranks, stages, expert_ranks=None)


def _tag_of(folder: Path, manifest: Manifest) -> str:
    """The tag that DeepSpeed loads;
    ``CheckpointError`` for what was saved without DeepSpeed."""
    if manifest.tag is None:
        raise CheckpointError(
            f"{folder} was saved without DeepSpeed, which cannot load it; go on with the trainer "
            "that saved it (ckpt from-dcp makes files for DeepSpeed of what FSDP or DCP saved), or "
            "begin a new training from its weights",
            "unsupported",
        )
    return manifest.tag


def require_state(checkpoint: RunCheckpoint) -> None:
    """``CheckpointError`` for a checkpoint without state of DeepSpeed,
    with what can be done."""
    if checkpoint.tier == "full" or (
        checkpoint.manifest is None and _may_have_state(checkpoint.folder)
    ):
        return

    newest = None
    if is_numbered(checkpoint.folder):
        newest = Run(checkpoint.folder.parent).newest()

    alternative = ""
    if newest is not None:
        alternative = f"resume from {newest.folder}, the newest full one, or "
    finding = WEIGHTS_ONLY
    if (checkpoint.folder / "optimizer.pt").exists():
        finding = (
            "was saved without DeepSpeed, whose state it lacks; DeepSpeed cannot go on from it"
        )
    raise CheckpointError(
        f"{checkpoint.folder}: {finding}: {alternative}make the model of its weights "
        "(from_pretrained) and train without resuming",
        "incomplete",
    )


def _may_have_state(folder: Path) -> bool:
    """Whether a folder without a manifest has state of DeepSpeed,
    or nothing that is known."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        return True

    inner_folders = (path for path in folder.iterdir() if path.is_dir())
    return any(map(is_tag_folder, inner_folders))


@dataclass(slots=True)
class RankState:
    """The state that this rank saved beside the engine's; ``random`` is ``None`` if it
    is not there."""

    random: Any
    extra: dict[str, Any]
    is_needed: bool = True

    @classmethod
    def none(cls) -> RankState:
        """The state of a rank that sets nothing."""
        return cls(None, {}, False)

    @classmethod
    def read(cls, source: ResumePoint, rank: int) -> RankState:
        """The state that ``rank_files.write`` wrote;
        ``CheckpointError`` if a file is damaged."""
        random = source.folder / rng.NAME.format(rank)
        extra = source.folder / rank_files.EXTRA.format(rank)
        return cls(
            plain.loads(random) if random.exists() else None,
            plain.loads(extra) if extra.exists() else {},
        )

    def lost(self, extra: Mapping[str, Any] | None) -> list[str]:
        """A line for each thing that does not come back."""
        if not self.is_needed:
            return []

        given_names = set(extra or {})
        losses = []
        if self.random is None:
            losses.append(NO_RANDOM_STATES)
        for name in sorted(given_names - set(self.extra)):
            losses.append(f"extra {name} was not saved")
        for name in sorted(set(self.extra) - given_names):
            losses.append(f"extra {name} was saved, but was not passed to be set")
        return losses

    def set(self, extra: Mapping[str, Any] | None) -> None:
        """Gives each object its state and, last, sets the random generators."""
        for name, target in (extra or {}).items() if self.is_needed else ():
            if name in self.extra:
                target.load_state_dict(self.extra[name])
        if self.random is not None:
            for missing_part in rng.restore(self.random):
                log.warning("could not set %s", missing_part)
