"""A training state written anew, as a folder: move, prove, and commit last (``staging``).

``ckpt.reshard`` and ``ckpt.universal`` decide what is written, here it is done:

OUTPUT/
  TAG/...                        DeepSpeed's files
  rng_state_R.pth, ...           rank R's, or where there was no such rank, that of R modulo those
  everything else                copied
  latest or latest_universal     the tag
  manifest.json                  if the source has one and the result is native, too
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt import __version__, model_folder, staging
from ckpt.runs import locks, manifest
from ckpt.runs.run import require_read
from converters import files, reshard, retrace, stream, universal, zero
from converters.errors import CheckpointError
from converters.optimizer_trees import Target
from converters.plan import Plan
from converters.universal import Universal, moving, proof

OURS = ("latest", manifest.NAME, manifest.PINNED)  # made anew, never copied
_RANKED = re.compile(r"(rng_state|extra_state|random_states)_(\d+)\.(pth|state|pkl)")
_ONLY = re.compile(r"rng_state\.(pth)")  # the Trainer's for a single rank
_COPIED = (  # beside what a model folder has; the Trainer's, Accelerate's, PEFT's and DeepSpeed's
    *("config.json", "README.md", "*.index.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*", "pytorch_model*.bin"),
    *("trainer_state.json", "training_args.bin", "scheduler*.pt", "scheduler*.bin", "scaler.pt"),
    *("sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A rewriting decided on but not begun: what is read, what is written, and where.

    ``source`` is a native checkpoint or a universal one, ``target`` what is made of it, or ``None``
    for the universal format. ``tag`` is that of the output, ``companions`` are the files to copy,
    under their new names; ``notes`` what a user should know.
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
        """The folder that the source's tag lies in."""
        return home_of(self.checkpoint)

    @property
    def pointer(self) -> str:
        """The file that names the tag."""
        return universal.LATEST if self.target is None else "latest"

    @property
    def nbytes(self) -> int:
        """Bytes of the output: DeepSpeed's files and the copied ones."""
        return self.plan.nbytes + sum(path.stat().st_size for path, _ in self.companions)


def home_of(checkpoint: zero.Checkpoint) -> Path:
    """The folder that a checkpoint's tag lies in."""
    return Path(os.path.abspath(checkpoint.place.folder)).parent


def stage_of(source: zero.Checkpoint | Universal) -> int:
    """The stage of the run; the model file of a universal folder may be of another."""
    if not isinstance(source, Universal):
        return source.stage
    found = source.checkpoint.ranks[0].optimizer.get("zero_stage")
    return found if found in (1, 2, 3) else source.checkpoint.stage


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


def run(
    rewriting: Rewriting,
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
    output, plan, folder = rewriting.output, rewriting.plan, rewriting.checkpoint.place.folder
    keep = [folder.resolve(), rewriting.home.resolve(), *rewriting.home.resolve().parents]
    staging.require_place(output, keep, overwrite)
    with (
        staging.told(output),
        locks.reading(folder),
        staging.staged(output, plan, rewriting.nbytes) as made,
    ):
        report = _move(rewriting, made, verify, workers, progress)
        counts = _prove(rewriting, made)
        back = retrace.read_back(plan, made) if read_back else 0
        _complete(rewriting, made)
    facts = describe(rewriting)
    facts["checks"] = counts | {
        "crc32_bytes": report.checked,
        "no_crc32_bytes": report.unchecked,
        "read_back_bytes": back,
        "verified": verify,
    }
    return facts


def _move(
    rewriting: Rewriting,
    made: Path,
    verify: bool,
    workers: int | None,
    progress: Callable[[int], Any],
) -> stream.Report:
    """Native files are few and large; those of a universal folder many and small."""
    plan = rewriting.plan
    if rewriting.target is None:
        return moving.execute(plan, made, verify=verify, workers=workers, progress=progress)
    (made / rewriting.tag).mkdir(exist_ok=True)
    return stream.execute(
        plan,
        made,
        verify=verify,
        allow_overflow=True,  # as torch rounds when the engine does it
        workers=workers,
        progress=progress,
    )


def _prove(rewriting: Rewriting, made: Path) -> dict[str, int]:
    source, target, plan = rewriting.source, rewriting.target, rewriting.plan
    if isinstance(source, Universal):
        assert target is not None
        return proof.from_universal(source, target, plan, made)
    if target is None:
        return proof.to_universal(source, plan, made)
    return reshard.prove(source, target, plan, made)


def _complete(rewriting: Rewriting, made: Path) -> None:
    """Everything beside DeepSpeed's files; the pointer and the manifest last."""
    for path, name in rewriting.companions:
        _copy(path, made / name)
    for inner in {made / rewriting.tag, *((made / n).parent for _, n in rewriting.companions)}:
        files.sync_folder(inner)
    files.write_file(made / rewriting.pointer, rewriting.tag.encode())
    if rewriting.target is None or isinstance(rewriting.source, Universal):
        return
    try:
        held = manifest.read(rewriting.home)
    except CheckpointError as error:  # there is none, or none that anybody could use
        require_read(error)
        return
    name = rewriting.output.name
    if held.tag == rewriting.tag:
        files.write_file(made / manifest.NAME, _sealed(held, rewriting.target, made, name).dumps())


def _copy(source: Path, target: Path) -> None:
    """Copies a file, synced."""
    target.parent.mkdir(exist_ok=True)
    with open(source, "rb") as file, files.replacing(target) as fd:
        writer, at = files.Writer(fd), 0
        while True:
            with files.named(source):
                piece = file.read(1 << 20)
            if not piece:
                break
            writer.write(piece, at)
            at += len(piece)


def save_of(held: manifest.Manifest, target: Target) -> str:
    """The save that a committed checkpoint becomes: the same for the same target."""
    return sha256(f"{held.save} {target}".encode()).hexdigest()[:32]


def _sealed(held: manifest.Manifest, target: Target, made: Path, name: str) -> manifest.Manifest:
    """The source's manifest ``held`` for what lies in ``made`` and will be called ``name``.

    It says what it is made of: making it says nothing about which run saved last.
    """
    paths = [path for path in made.rglob("*") if path.is_file() and path.name != staging.RECORD]
    return replace(
        held,
        stage=target.stage,
        world_size=target.world_size,
        node=0,
        nodes=1,
        save=save_of(held, target),
        created=time.time(),
        name=name,
        made_of=held.save,
        versions={**held.versions, "ckpt": __version__},
        files={path.relative_to(made).as_posix(): _digested(path) for path in paths},
    )


def _digested(path: Path) -> manifest.File:
    with files.named(path):
        return manifest.digest(path)


def describe(rewriting: Rewriting) -> dict[str, Any]:
    """The facts of a rewriting as JSON has them. Sizes are bytes."""
    source, target = rewriting.checkpoint, rewriting.target
    return {
        "ckpt": __version__,
        "output": str(rewriting.output),
        "tag": rewriting.tag,
        "source": {
            "folder": str(source.place.folder),
            "stage": stage_of(rewriting.source),
            "world_size": source.world_size,
            "step": source.step,
            "deepspeed": source.version,
        },
        **({"stage": target.stage, "world_size": target.world_size} if target else {}),
        "files": [{"name": s.filename, "size": s.nbytes} for s in rewriting.plan.shards],
        "copied": [name for _, name in rewriting.companions],
        "read_bytes": rewriting.plan.read_bytes,
        "write_bytes": rewriting.nbytes,
        "free_bytes": files.free_space(rewriting.output),
        "notes": list(rewriting.notes),
    }
