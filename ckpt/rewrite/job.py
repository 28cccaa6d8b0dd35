"""A training state rewritten,
as a folder: move, prove, and commit last (``staging``).

``ckpt.rewrite.reshard`` and ``ckpt.rewrite.universal`` decide what is written,
here it is done:

OUTPUT/
  TAG/...                        DeepSpeed's files
  rng_state_R.pth, ...           rank R's, or where there was no such rank, that of R modulo those
  everything else                copied
  latest or latest_universal     the tag
  manifest.json                  if the source has one and the result is native, too
  rewriting.json                 otherwise: what the output was made of
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ckpt import results
from ckpt.folders import filenames
from ckpt.rewrite import output_folder, records, state_work
from ckpt.rewrite.result import RewriteChecks, RewriteResult
from ckpt.runs.ancestry import Ancestry
from ckpt.runs.manifest import Manifest
from ckpt.weights.arguments import naming_arguments
from ckpt.weights.companions import model_folder
from converters.lazy_pattern import LazyPattern
from converters.plan import Plan
from converters.storage import local, open_files, stores
from converters.storage.url_path import absolute
from converters.words import counted, some
from converters.zero import checkpoint as zero
from converters.zero.merging import checkpoint as merged
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import expert_proof, pipeline_proof, reshard, unpartitioned_files
from converters.zero.native import proof as retrace
from converters.zero.native.target import TargetTopology
from converters.zero.universal import proof, reader

ARGUMENTS = (  # of the functions for users, as errors name them
    *("output=", "tag=", "world_size=", "stage=", "like=", "sub_group_size=", "zero_init=True"),
    *("tp_rules=", "tp=", "ep=", "pp=", "zero_init=False"),
    *("verify=False", "read_back=True", "overwrite=True"),
)
# written, never copied
WRITTEN_NAMES = ("latest", filenames.MANIFEST, filenames.REWRITING, filenames.PINNED)
SAME_IN_ENGINE = "the engine must have the same"  # the end of a note on a setting
_RANKED = LazyPattern(r"(rng_state|extra_state|random_states)_(\d+)\.(pth|state|pkl)")
_ONLY = LazyPattern(r"rng_state\.(pth)")  # the Trainer's for a single rank
# beside what a model folder has; the Trainer's, Accelerate's, PEFT's and DeepSpeed's
_COPIED = (
    *("config.json", "README.md", "*.index.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*", "pytorch_model*.bin"),
    *("trainer_state.json", "training_args.bin"),
    *("scheduler*.pt", "scheduler*.bin", "scaler.pt"),
    *("sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Rewriting:
    """A rewriting decided on but not begun: what is read, what is written, and where.

    ``source`` is a native checkpoint or what a universal one stands for, and ``path``
    what the caller named it by; ``target`` is what is made of it, or ``None`` for the
    universal format. ``tag`` is that of the output, ``companions`` are the files to copy,
    under their new names; ``notes`` what a user should know; ``tensor_ranks`` how
    parameters are cut for tensor-parallel ranks, if there will be several.
    """

    source: zero.Checkpoint
    path: Path
    target: TargetTopology | None
    plan: Plan
    output: Path
    tag: str
    companions: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...] = ()
    tensor_ranks: TensorRanks | None = None

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        form = "universal"
        if self.target is not None:
            form = f"stage {self.target.stage}, {counted(self.target.rank_count, 'rank')}"
        source = str(self.folder)
        return f"<Rewriting {source!r} to {str(self.output)!r}: {form}>"

    @property
    def folder(self) -> Path:
        """The folder of the source's tag."""
        return self.source.place.folder

    @property
    def home(self) -> Path:
        """The folder that the source's tag lies in."""
        return home_of(self.source)

    @property
    def pointer(self) -> str:
        """The file that names the tag."""
        return reader.LATEST if self.target is None else "latest"

    @property
    def has_small_files(self) -> bool:
        """Native files are few and large; those of a universal folder many and small."""
        return self.target is None

    @property
    def written_names(self) -> tuple[str, ...]:
        """Files of the output beside DeepSpeed's and the copied ones."""
        return self.pointer, filenames.MANIFEST, filenames.PINNED

    @property
    def nbytes(self) -> int:
        """Bytes of the output: DeepSpeed's files and the copied ones."""
        return output_folder.nbytes_of(self.plan, self.companions)


def home_of(checkpoint: zero.Checkpoint) -> Path:
    """The folder that a checkpoint's tag lies in."""
    return absolute(checkpoint.place.folder).parent


def companions_for(
    home: Path, old_world_size: int, new_world_size: int
) -> Iterator[tuple[Path, str]]:
    """The files to copy and their names.

    Those of ranks go round where there are too few.
    """
    ranked_files: dict[tuple[str, str], dict[int, Path]] = {}
    companions = set(model_folder.companions(home))
    files = {path for path in map(home.joinpath, stores.names(home)) if stores.is_file(path)}

    for path in sorted(companions | files):
        if match := _RANKED.fullmatch(path.name):
            ranked_files.setdefault((match[1], match[3]), {})[int(match[2])] = path
        elif (match := _ONLY.fullmatch(path.name)) and old_world_size == 1:
            ranked_files.setdefault(("rng_state", match[1]), {}).setdefault(0, path)
        elif path in companions or _is_copied(path.name):
            yield path, path.relative_to(home).as_posix()

    for (name, ending), paths_by_rank in sorted(ranked_files.items()):
        # the Trainer's for a single rank has no number
        is_numbered = (name, ending, new_world_size) != ("rng_state", "pth", 1)
        for rank in range(new_world_size):
            source_path = paths_by_rank.get(rank % old_world_size)
            if source_path is not None:
                suffix = f"_{rank}" if is_numbered else ""
                yield source_path, f"{name}{suffix}.{ending}"


def notes_on_lost_ranks(companions: Sequence[tuple[Path, str]], world_size: int) -> Iterator[str]:
    """A note for each sort of file of which some ranks get none,
    because the checkpoint lacks the one that they would use."""
    ranks_by_sort: dict[tuple[str, str], set[int]] = {}
    for _, name in companions:
        if match := _RANKED.fullmatch(name):
            ranks_by_sort.setdefault((match[1], match[3]), set()).add(int(match[2]))

    for (sort, ending), ranks in sorted(ranks_by_sort.items()):
        missing = [f"{sort}_{rank}.{ending}" for rank in range(world_size) if rank not in ranks]
        if missing:
            yield f"{some(missing)} cannot be made: the file of a rank is lost in the checkpoint"


def _is_copied(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _COPIED)


@naming_arguments(*ARGUMENTS)
@open_files.once()
def execute(
    rewriting: Rewriting,
    *,
    verify: bool = True,
    read_back: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], Any] = lambda _: None,
    share_count: int | None = None,
) -> RewriteResult:
    """Makes the output folder, all at once, and returns what was made and proven.

    With ``share_count`` it makes the folder of what so many calls of
    ``state_work.write_share`` wrote.

    ``verify`` compares the CRC32s of what is read, and a sample of the 16-bit weights
    with the fp32 ones; ``read_back`` reads the finished files and compares theirs. That
    every element is where it belongs is proven in any case, from the finished files.
    ``CheckpointError`` if something is wrong; then nothing is left that looks finished.
    """
    work = state_work.work_of(rewriting, verify, overwrite)
    with state_work.moved(
        rewriting, work, workers=workers, progress=progress, share_count=share_count
    ) as (staged_folder, report):
        counts = prove(rewriting, staged_folder)
        read_back_bytes = retrace.read_back(work.plan, staged_folder) if read_back else 0
        _complete(rewriting, staged_folder)

    checks = RewriteChecks(
        parameter_tensors=counts["parameters"],
        optimizer_tensors=counts["states"],
        other_tensors=counts["others"],
        reference_tensors=counts["copies"],
        crc32_bytes=report.checked,
        no_crc32_bytes=report.unchecked,
        read_back_bytes=read_back_bytes,
        verified=verify,
    )
    return replace(preview(rewriting), dry_run=False, checks=checks)


def run(rewriting: Rewriting, **options: Any) -> dict[str, Any]:
    """Does what ``execute`` does, and returns the result as ``--json`` prints it."""
    return results.document(execute(rewriting, **options))


@open_files.once()
def prove(rewriting: Rewriting, staged_folder: Path) -> dict[str, int]:
    """Reads the finished files and compares all of them with the source; counts tensors.

    ``CheckpointError`` if anything is not equal.
    """
    source, target, plan = rewriting.source, rewriting.target, rewriting.plan
    if target is None:
        return proof.to_universal(source, plan, staged_folder)
    if not target.stage and not target.stages:
        tensor_ranks = rewriting.tensor_ranks
        return unpartitioned_files.prove(source, target, plan, staged_folder, tensor_ranks)
    if isinstance(source, ExpertsCheckpoint):
        return expert_proof.prove(source, target, plan, staged_folder, rewriting.tensor_ranks)
    if target.stages and isinstance(source, merged.MergedCheckpoint):
        return pipeline_proof.prove(source, target, plan, staged_folder, rewriting.tensor_ranks)
    return reshard.prove(source, target, plan, staged_folder, rewriting.tensor_ranks)


def _complete(rewriting: Rewriting, staged_folder: Path) -> None:
    """Writes everything beside DeepSpeed's files; the pointer and the manifest last."""
    output_folder.copy_companions(rewriting, staged_folder, staged_folder / rewriting.tag)

    source_manifest = records.source_manifest(rewriting.home, _source_tag(rewriting))
    origin = _origin(rewriting, source_manifest)
    target, manifest = rewriting.target, None
    if source_manifest is not None and target is not None:
        manifest = records.rewritten(source_manifest, target, origin)
    else:
        records.write_record(staged_folder, origin, target)

    local.write_file(staged_folder / rewriting.pointer, rewriting.tag.encode())
    if manifest is not None:
        records.write_manifest(staged_folder, manifest, rewriting.output.name)


def _source_tag(rewriting: Rewriting) -> str:
    return rewriting.folder.name


def _origin(rewriting: Rewriting, source_manifest: Manifest | None) -> Ancestry:
    """The checkpoint that the output is made of."""
    source = merged.original(rewriting.source)
    origin = Ancestry(
        "universal" if rewriting.target is None else "resharded",
        name=rewriting.home.name or None,
        step=source.step,
        world_size=source.world_size,
        stage=source.stage,
    )
    return records.first_origin(rewriting.home, source_manifest, origin)


def preview(rewriting: Rewriting) -> RewriteResult:
    """The files that the rewriting would read and write; reads no tensor."""
    source = merged.original(rewriting.source)
    return output_folder.preview_of(rewriting, source, source.stage or 0, source.world_size)
