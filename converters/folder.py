"""Finding a checkpoint: from the path a user gives to the files of one tag.

    out/checkpoint-8/            root: what a Trainer or ``engine.save_checkpoint`` wrote into
      latest                       the tag, as text without a newline
      global_step8/                the tag folder; any name, even with a slash in it
        [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt    one a rank: fp32 and optimizer state
        mp_rank_MM_model_states.pt                          stages 0 to 2: the module
        zero_pp_rank_R_mp_rank_MM_model_states.pt           stage 3: one a rank

Up to 0.3.13 no underscore stood before ``optim_states``; the fast writer appends ``-RANK.COUNT``.
Names: ``deepspeed/runtime/engine.py`` (``_get_*_ckpt_name``) of 0.3 to 0.19.8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from converters import files
from converters.errors import CheckpointError

_SUFFIX = r"\.pt(?:-(?P<writer>\d+)\.\d+)?"
_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states" + _SUFFIX
)
_PARTITIONED = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_model_states" + _SUFFIX)
_MODULE = re.compile(r"mp_rank_(?P<mp>\d+)_model_states" + _SUFFIX)
_FOREIGN = (
    (
        re.compile(r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*"),
        "holds expert files (DeepSpeed-MoE or AutoEP); merging experts is not supported yet",
    ),
    (
        re.compile(r"layer_\d+(-model_\d+)?-model_states\.pt"),
        "is a pipeline-parallel checkpoint (layer_NN files); merging stages is not supported yet",
    ),
)


_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_?(optim|model)_states")


def rank_file(name: str) -> tuple[int, str] | None:
    """The rank of a file of one rank and its kind, optim or model, by its name or a part of it."""
    found = _RANK.search(name)
    return (int(found[1]), found[2]) if found else None


@dataclass(frozen=True, slots=True)
class Place:
    """One tag: ``root`` holds it (and config.json, if any), ``folder`` is the tag's own."""

    root: Path
    folder: Path
    tag: str


@dataclass(frozen=True, slots=True)
class Files:
    """The state files of a tag: optimizer and stage 3 model files by rank, and the module file."""

    optimizer: dict[int, Path]
    partitioned: dict[int, Path]
    module: Path | None


def find(path: Path, tag: str | None = None) -> Place:
    """The tag that ``path`` (a Trainer folder, a save_dir or a tag folder) means.

    ``tag`` wins over everything. ``CheckpointError`` names what is there instead.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected the folder of a checkpoint", "incomplete")
    if tag is not None:
        if is_tag_folder(path) and path.resolve().name == tag:
            return Place(path.parent, path, tag)
        if not (path / tag).is_dir():
            raise CheckpointError(f"{path} has no tag {tag}; {_offer(path)}", "incomplete")
        return Place(path, path / tag, tag)
    if is_tag_folder(path):
        return Place(path.resolve().parent, path, path.resolve().name)
    latest = path / "latest"
    if not latest.is_file():
        raise CheckpointError(f"{path} has no file latest; {_offer(path)}", "incomplete")
    named = _tag_in(latest)
    if named is None or not (path / named).is_dir():
        said = repr(named) if named else "no tag"
        raise CheckpointError(
            f"{latest} names {said}, which is not there; {_offer(path)}", "incomplete"
        )
    inner = (path / named).parent
    if inner != path and (inner / "latest").is_file():  # a run's pointer, checkpoint-5/global_step5
        return Place(inner, path / named, (path / named).name)
    return Place(path, path / named, named)


def _tag_in(latest: Path) -> str | None:
    """The tag that the file names; ``None`` if that can be no folder beside it."""
    with open(latest, "rb") as file, files.named(latest):
        data = file.read(4096)
    try:
        named = data.decode().strip()
    except UnicodeDecodeError:
        return None
    parts = Path(named).parts
    usable = parts and "\0" not in named and ".." not in parts and not Path(named).is_absolute()
    return named if usable and all(len(part.encode()) < 256 for part in parts) else None


def is_tag_folder(path: Path) -> bool:
    """Whether state files lie directly in ``path``."""
    forms = (_OPTIMIZER, _PARTITIONED, _MODULE)
    return any(form.fullmatch(entry.name) for entry in path.iterdir() for form in forms)


def _offer(path: Path) -> str:
    """What the user can name instead: the tags in ``path``, or the checkpoints below it."""
    below = sorted(
        {
            found.parent.relative_to(path).as_posix()
            for pattern in ("*/*_states.pt*", "*/*/*_states.pt*")
            for found in path.glob(pattern)
        }
    )
    roots = sorted(latest.parent.name for latest in path.glob("*/latest"))
    if roots:
        return f"it holds the checkpoints {', '.join(roots)}: name one of these folders"
    if below:
        return f"it holds the tags {', '.join(below)}: choose one with --tag"
    return "and no checkpoint of DeepSpeed lies below it"


def scan(place: Place) -> Files:
    """The state files of the tag; ``CheckpointError`` if it is of a kind that is not read."""
    names = sorted(entry.name for entry in place.folder.iterdir())
    if (place.folder / "zero").is_dir():
        what = "is a universal checkpoint; convert the tag it was made from, or make native files "
        raise _unsupported(place, what + "of it first with ckpt from-universal")
    for form, what in _FOREIGN:
        if any(form.fullmatch(name) for name in names):
            raise _unsupported(place, what)
    optimizer = _by_rank(place, names, _OPTIMIZER)
    partitioned = _by_rank(place, names, _PARTITIONED)
    modules = {int(m["mp"]) for name in names if (m := _MODULE.fullmatch(name))}
    if max(modules, default=0) > 0:
        raise _unsupported(place, _PARALLEL)
    module = next((place.folder / name for name in names if _MODULE.fullmatch(name)), None)
    if not optimizer and not partitioned and module is None:
        raise CheckpointError(
            f"{place.folder} holds no *_states.pt; {_offer(place.root)}", "incomplete"
        )
    return Files(optimizer, partitioned, module)


_PARALLEL = (
    "was saved with tensor or pipeline parallelism (mp_rank_01 and up); merging these is not "
    "supported yet"
)


def _unsupported(place: Place, what: str) -> CheckpointError:
    return CheckpointError(f"{place.folder} {what}", "unsupported")


def _by_rank(place: Place, names: list[str], form: re.Pattern[str]) -> dict[int, Path]:
    """The files of one kind by rank. Of a fast writer's equal copies, the first."""
    found: dict[int, Path] = {}
    for name in names:
        match = form.fullmatch(name)
        if match is None:
            continue
        if int(match["mp"]):
            raise _unsupported(place, _PARALLEL)
        rank = int(match["rank"])
        if rank in found and match["writer"] is None:
            raise CheckpointError(
                f"{place.folder} has two files of rank {rank}, {found[rank].name} and {name}: two "
                "saves are mixed; move the older one away"
            )
        found.setdefault(rank, place.folder / name)
    return dict(sorted(found.items()))
