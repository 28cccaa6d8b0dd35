"""A checkpoint for another world size or stage: plan, move, prove, and commit last (``staging``).

out/checkpoint-500-w3/       three ranks; checkpoint-500-z3-w3 where the stage is another, too
  latest                       the tag
  global_step500/...           DeepSpeed's files
  rng_state_R.pth, ...         rank R's, or where there was no such rank, that of R modulo those
  everything else              copied
  manifest.json                if the source has one
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt import __version__, model_folder, staging
from ckpt.runs import locks, manifest
from ckpt.runs.run import require_read
from converters import files, reshard, retrace, stream, zero
from converters.errors import CheckpointError
from converters.optimizer_trees import Target
from converters.plan import Plan

_RANKED = re.compile(r"(rng_state|extra_state|random_states)_(\d+)\.(pth|state|pkl)")
_ONLY = re.compile(r"rng_state\.(pth)")  # the Trainer's for a single rank
_COPIED = (  # beside what a model folder has; the Trainer's, Accelerate's, PEFT's and DeepSpeed's
    *("config.json", "README.md", "*.index.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*", "pytorch_model*.bin"),
    *("trainer_state.json", "training_args.bin", "scheduler*.pt", "scheduler*.bin", "scaler.pt"),
    *("sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)
_OURS = ("latest", manifest.NAME, manifest.PINNED)


@dataclass(frozen=True, slots=True)
class Resharding:
    """A resharding decided on but not begun: what is read, what is written, and where.

    ``companions`` are the files to copy, under their new names; ``notes`` what a user should know.
    """

    checkpoint: zero.Checkpoint
    target: Target
    plan: Plan
    output: Path
    companions: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def home(self) -> Path:
        """The folder that the tag lies in."""
        return Path(os.path.abspath(self.checkpoint.place.folder)).parent

    @property
    def tag(self) -> str:
        """The tag in the output."""
        return reshard.tag_folder(self.checkpoint)

    @property
    def nbytes(self) -> int:
        """Bytes of the output: DeepSpeed's files and the copied ones."""
        return self.plan.nbytes + sum(path.stat().st_size for path, _ in self.companions)


def prepare(
    checkpoint: Path,
    world_size: int,
    *,
    stage: int | None = None,
    output: Path | None = None,
    tag: str | None = None,
    sub_group_size: int | None = None,
) -> Resharding:
    """Plans the same checkpoint for ``world_size`` ranks and a stage, its own by default.

    Reads pickles, no tensors. ``sub_group_size`` (elements, stage 3) defaults to the run's own.
    Raises ``CheckpointError`` for what is damaged, or cannot be cut up anew.
    """
    source = zero.read(checkpoint, tag)
    target = reshard.target(source, stage, world_size, sub_group_size)
    if (target.stage, target.world_size) == (source.stage, source.world_size):
        raise CheckpointError(
            f"{source.place.folder} is of stage {source.stage} for {source.world_size} ranks "
            "already; load it as it is",
            "output",
        )
    plan = reshard.plan(source, target)
    home = Path(os.path.abspath(source.place.folder)).parent
    if output is None:
        stage_part = f"-z{target.stage}" if target.stage != source.stage else ""
        output = home.with_name(f"{home.name}{stage_part}-w{world_size}")
    companions = tuple(companions_for(home, source.world_size, world_size))
    copied = {path.name for path, _ in companions}
    left = [
        path.name
        for path in sorted(home.iterdir())
        if path.is_file() and path.name not in (*copied, *_OURS)
    ]
    notes = [*source.notes, *notes_on(source, target)]
    if left:
        notes.append(f"not copied: {', '.join(left)}")
    return Resharding(source, target, plan, Path(os.path.abspath(output)), companions, tuple(notes))


def companions_for(home: Path, before: int, after: int) -> Iterator[tuple[Path, str]]:
    """The files to copy and their names; those of ranks go round where there are too few."""
    ranked: dict[tuple[str, str], dict[int, Path]] = {}
    wanted = set(model_folder.companions(home))
    for path in sorted(wanted.union(path for path in home.iterdir() if path.is_file())):
        if found := _RANKED.fullmatch(path.name):
            ranked.setdefault((found[1], found[3]), {})[int(found[2])] = path
        elif (found := _ONLY.fullmatch(path.name)) and before == 1:
            ranked.setdefault(("rng_state", found[1]), {}).setdefault(0, path)
        elif path in wanted or any(fnmatch(path.name, form) for form in _COPIED):
            yield path, path.relative_to(home).as_posix()
    for (name, ending), held in sorted(ranked.items()):
        for rank in range(after):
            if rank % before in held:
                numbered = (name, ending, after) != ("rng_state", "pth", 1)
                number = f"_{rank}" if numbered else ""
                yield held[rank % before], f"{name}{number}.{ending}"


def notes_on(source: zero.Checkpoint, target: Target) -> Iterator[str]:
    setting = source.model.setting
    if target.world_size > source.world_size:
        yield (
            f"the ranks from {source.world_size} on are new: each has the random and extra state "
            f"of the rank modulo {source.world_size}"
        )
    if target.world_size < source.world_size:
        yield f"what only ranks {target.world_size} and up had, such as random states, is left out"
    if target.stage == 3 and source.stage < 3:
        yield f"made for sub_group_size {target.sub_group_size}; the engine must have the same"
    if target.stage < 3 and target.dealt:
        yield "made for round_robin_gradients; the engine must have it, too"
    if target.stage < 3 and setting("zero_optimization", "elastic_checkpoint"):
        yield "elastic_checkpoint: DeepSpeed asks for optimizers that count steps in their groups"


def run(
    resharding: Resharding,
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
    output, source = resharding.output, resharding.checkpoint
    folder = source.place.folder
    keep = [folder.resolve(), resharding.home.resolve(), *resharding.home.resolve().parents]
    staging.require_place(output, keep, overwrite)
    with (
        staging.told(output),
        locks.reading(folder),
        staging.staged(output, resharding.plan, resharding.nbytes) as made,
    ):
        (made / resharding.tag).mkdir(exist_ok=True)
        report = stream.execute(
            resharding.plan,
            made,
            verify=verify,
            allow_overflow=True,  # as torch rounds when the engine does it
            workers=workers,
            progress=progress,
        )
        counts = reshard.prove(source, resharding.target, resharding.plan, made)
        back = retrace.read_back(resharding.plan, made) if read_back else 0
        _complete(resharding, made)
    facts = describe(resharding)
    facts["checks"] = counts | {
        "crc32_bytes": report.checked,
        "no_crc32_bytes": report.unchecked,
        "read_back_bytes": back,
        "verified": verify,
    }
    return facts


def _complete(resharding: Resharding, made: Path) -> None:
    """Everything beside DeepSpeed's files; ``latest`` and the manifest last."""
    copy_companions(resharding.companions, made)
    for inner in {path.parent for path in made.rglob("*")}:
        files.sync_folder(inner)
    files.write_file(made / "latest", resharding.tag.encode())
    try:
        held = manifest.read(resharding.home)
    except CheckpointError as error:  # there is none, or none that anybody could use
        require_read(error)
        return
    if held.tag == resharding.tag:
        files.write_file(made / manifest.NAME, _sealed(resharding, held, made).dumps())


def copy_companions(companions: Iterable[tuple[Path, str]], made: Path) -> None:
    """Copies files under their new names into ``made``, each synced."""
    for path, name in companions:
        (made / name).parent.mkdir(exist_ok=True)
        with open(path, "rb") as file, files.replacing(made / name) as fd:
            writer, at = files.Writer(fd), 0
            while True:
                with files.named(path):
                    piece = file.read(1 << 20)
                if not piece:
                    break
                writer.write(piece, at)
                at += len(piece)


def _sealed(resharding: Resharding, held: manifest.Manifest, made: Path) -> manifest.Manifest:
    """The source's manifest ``held`` for what lies in ``made``."""
    target = resharding.target
    paths = [path for path in made.rglob("*") if path.is_file() and path.name != staging.RECORD]
    return replace(
        held,
        stage=target.stage,
        world_size=target.world_size,
        node=0,
        nodes=1,
        save=sha256(f"{held.save} {target}".encode()).hexdigest()[:32],
        created=time.time(),
        versions={**held.versions, "ckpt": __version__},
        files={path.relative_to(made).as_posix(): _digested(path) for path in paths},
    )


def _digested(path: Path) -> manifest.File:
    with files.named(path):
        return manifest.digest(path)


def describe(resharding: Resharding) -> dict[str, Any]:
    """The facts of a resharding as JSON has them. Sizes are bytes."""
    source, target = resharding.checkpoint, resharding.target
    return {
        "ckpt": __version__,
        "output": str(resharding.output),
        "tag": resharding.tag,
        "source": {
            "folder": str(source.place.folder),
            "stage": source.stage,
            "world_size": source.world_size,
            "step": source.step,
            "deepspeed": source.version,
        },
        "stage": target.stage,
        "world_size": target.world_size,
        "files": [{"name": s.filename, "size": s.nbytes} for s in resharding.plan.shards],
        "copied": [name for _, name in resharding.companions],
        "read_bytes": resharding.plan.read_bytes,
        "write_bytes": resharding.nbytes,
        "free_bytes": files.free_space(resharding.output),
        "notes": list(resharding.notes),
    }
