"""To DeepSpeed's universal format and back: plan, move, prove, and commit last (``staging``).

out/checkpoint-500_universal/      for any world size and stage, with "load_universal": true
  latest_universal                   the tag
  global_step500_universal/          zero/NAME/*.pt, and both kinds of model file
  everything else                    copied
out/checkpoint-500-z2-w3/          native files again
  latest, global_step500/...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt import __version__, reshard, staging, universal_limits
from ckpt.runs import locks
from converters import (
    files,
    groups,
    retrace,
    stream,
    trees,
    universal,
    zero,
)
from converters import reshard as native
from converters.optimizer_trees import Target
from converters.plan import Plan
from converters.universal import LATEST, SUFFIX, Universal, moving, planning, proof


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion decided on but not begun: what is read, what is written, and where.

    To the universal format ``source`` is a ``Checkpoint`` and ``target`` ``None``; from it a
    ``Universal`` and what is made. ``companions`` are the files to copy, under their new names.
    """

    source: zero.Checkpoint | Universal
    target: Target | None
    plan: Plan
    output: Path
    tag: str
    companions: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> zero.Checkpoint:
        """What the source is, or stands for."""
        return self.source.checkpoint if isinstance(self.source, Universal) else self.source

    @property
    def home(self) -> Path:
        """The folder that the tag lies in."""
        return _home(self.checkpoint)

    @property
    def pointer(self) -> str:
        """The file that names the tag."""
        return LATEST if self.target is None else "latest"

    @property
    def nbytes(self) -> int:
        """Bytes of the output: DeepSpeed's files and the copied ones."""
        return self.plan.nbytes + sum(path.stat().st_size for path, _ in self.companions)


def prepare_to(
    checkpoint: Path, *, output: Path | None = None, tag: str | None = None
) -> Conversion:
    """Plans the universal folder of a checkpoint of ZeRO 1, 2 or 3.

    Reads pickles, no tensors. Raises ``CheckpointError`` for what is damaged, or has no partitions.
    """
    source = zero.read(checkpoint, tag)
    plan = planning.to_universal(source)
    found = groups.read(source, trees.read(source.ranks[0].path).root)
    home = _home(source)
    return Conversion(
        source,
        None,
        plan,
        Path(os.path.abspath(output or home.with_name(home.name + SUFFIX))),
        planning.universal_tag(source),
        tuple(reshard.companions_for(home, source.world_size, source.world_size)),
        (*source.notes, *universal_limits.notes(source, found)),
    )


def prepare_from(
    folder: Path,
    world_size: int,
    *,
    stage: int | None = None,
    output: Path | None = None,
    tag: str | None = None,
    like: Path | None = None,
    sub_group_size: int | None = None,
) -> Conversion:
    """Plans native files of a universal folder for ``world_size`` ranks and a stage.

    The stage defaults to that of the run that saved. ``like`` is a native checkpoint of the same
    model, for a folder that does not tell the order of the parameters. Reads pickles, and the first
    65,536 elements of each parameter. Raises ``CheckpointError``.
    """
    source = universal.read(folder, tag, zero.read(like) if like else None)
    checkpoint, home = source.checkpoint, _home(source.checkpoint)
    saved = _saved(source)
    target = native.target(checkpoint, stage or saved, world_size, sub_group_size)
    plan = planning.from_universal(source, target)
    stage_part = f"-z{target.stage}" if target.stage != saved else ""
    name = f"{home.name.removesuffix(SUFFIX)}{stage_part}-w{world_size}"
    return Conversion(
        source,
        target,
        plan,
        Path(os.path.abspath(output or home.with_name(name))),
        planning.native_tag(source),
        tuple(reshard.companions_for(home, checkpoint.world_size, world_size)),
        (*checkpoint.notes, *reshard.notes_on(checkpoint, target)),
    )


def _saved(source: zero.Checkpoint | Universal) -> int:
    """The stage of the run; the model file of a universal folder may be of another."""
    if not isinstance(source, Universal):
        return source.stage
    found = source.checkpoint.ranks[0].optimizer.get("zero_stage")
    return found if found in (1, 2, 3) else source.checkpoint.stage


def _home(checkpoint: zero.Checkpoint) -> Path:
    return Path(os.path.abspath(checkpoint.place.folder)).parent


def run(
    conversion: Conversion,
    *,
    verify: bool = True,
    read_back: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Makes the output folder, all at once, and returns the facts of it.

    ``verify`` compares the CRC32s of what is read; ``read_back`` reads the finished files and
    compares theirs. That every element is where it belongs is proven in any case, from the finished
    files. ``CheckpointError`` if something is wrong; then nothing is left that looks finished.
    """
    output, folder = conversion.output, conversion.checkpoint.place.folder
    keep = [folder.resolve(), conversion.home.resolve(), *conversion.home.resolve().parents]
    staging.require_place(output, keep, overwrite)
    with (
        staging.told(output),
        locks.reading(folder),
        staging.staged(output, conversion.plan, conversion.nbytes) as made,
    ):
        report = _move(conversion, made, verify, workers, progress)
        counts = _prove(conversion, made)
        back = retrace.read_back(conversion.plan, made) if read_back else 0
        _complete(conversion, made)
    facts = describe(conversion)
    facts["checks"] = counts | {
        "crc32_bytes": report.checked,
        "no_crc32_bytes": report.unchecked,
        "read_back_bytes": back,
        "verified": verify,
    }
    return facts


def _move(
    conversion: Conversion,
    made: Path,
    verify: bool,
    workers: int | None,
    progress: Callable[[int], Any],
) -> stream.Report:
    """Native files are few and large; those of a universal folder many and small."""
    plan = conversion.plan
    if conversion.target is None:
        return moving.execute(plan, made, verify=verify, workers=workers, progress=progress)
    (made / conversion.tag).mkdir(exist_ok=True)
    return stream.execute(
        plan,
        made,
        verify=verify,
        allow_overflow=True,  # as torch rounds when the engine does it
        workers=workers,
        progress=progress,
    )


def _prove(conversion: Conversion, made: Path) -> dict[str, int]:
    source, plan = conversion.source, conversion.plan
    if isinstance(source, Universal):
        assert conversion.target is not None
        return proof.from_universal(source, conversion.target, plan, made)
    return proof.to_universal(source, plan, made)


def _complete(conversion: Conversion, made: Path) -> None:
    """Everything beside DeepSpeed's files; the pointer last."""
    reshard.copy_companions(conversion.companions, made)
    inside = {(made / name).parent for _, name in conversion.companions}
    for inner in inside | ({made / conversion.tag} if conversion.target else set()):
        files.sync_folder(inner)
    files.write_file(made / conversion.pointer, conversion.tag.encode())


def describe(conversion: Conversion) -> dict[str, Any]:
    """The facts of a conversion as JSON has them. Sizes are bytes."""
    source, target = conversion.checkpoint, conversion.target
    facts = {
        "ckpt": __version__,
        "output": str(conversion.output),
        "tag": conversion.tag,
        "source": {
            "folder": str(source.place.folder),
            "stage": _saved(conversion.source),
            "world_size": source.world_size,
            "step": source.step,
            "deepspeed": source.version,
        },
        "files": [{"name": s.filename, "size": s.nbytes} for s in conversion.plan.shards],
        "copied": [name for _, name in conversion.companions],
        "read_bytes": conversion.plan.read_bytes,
        "write_bytes": conversion.nbytes,
        "free_bytes": files.free_space(conversion.output),
        "notes": list(conversion.notes),
    }
    return facts | ({"stage": target.stage, "world_size": target.world_size} if target else {})
