"""Finding a checkpoint: from the path a user gives to the files of one tag.

    out/checkpoint-8/            root: what a Trainer or ``engine.save_checkpoint`` wrote into
      latest                       the tag, as text without a newline
      global_step8/                the tag folder; any name, even with a slash in it
        [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt    one a rank: fp32 and optimizer state
        mp_rank_MM_model_states.pt                          stages 0 to 2: the module
        zero_pp_rank_R_mp_rank_MM_model_states.pt           stage 3: one a rank

Up to 0.3.13 no underscore stood before ``optim_states``; the fast writer appends
``-RANK.COUNT``. Names: ``deepspeed/runtime/engine.py`` (``_get_*_ckpt_name``) of
0.3 to 0.19.8.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from converters.detect import detection, state_folders
from converters.detect.filenames import MODULE, OPTIMIZER, PARTITIONED
from converters.detect.state_folders import is_tag_folder as is_tag_folder
from converters.detect.state_folders import tags as tags
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place as Place
from converters.storage import misplaced_files, stores

_RANK = LazyPattern(r"(?:zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})_?(optim|model)_states")


def rank_file(name: str) -> tuple[int | None, int, str] | None:
    """The rank of a file of one rank, its model-parallel rank,
    and its kind, optim or model.

    ``name`` is its name or a part of it. The model file of stages 0 to 2 has no rank.
    """
    match = _RANK.search(name)
    if match is None:
        return None
    return None if match[1] is None else int(match[1]), int(match[2]), match[3]


class Files(NamedTuple):
    """The state files of a tag.

    Optimizer files and model files of stage 3 are by rank; ``module`` is the one of
    other stages.
    """

    optimizer: dict[int, Path]
    partitioned: dict[int, Path]
    module: Path | None


def find(path: Path, tag: str | None = None) -> Place:
    """The tag that ``path`` (a Trainer folder, a save_dir or a tag folder) means.

    ``tag`` wins over everything. ``CheckpointError`` says what is there instead.
    """
    if not stores.is_folder(path):
        raise _instead(path)
    if tag is not None:
        return _place_of_tag(path, tag)
    if is_tag_folder(path):
        return Place(path.resolve().parent, path, path.resolve().name)

    latest = path / "latest"
    if not stores.is_file(latest):
        if link_note := misplaced_files.link(latest):
            raise CheckpointError(f"{path} has no file latest{link_note}", "incomplete")
        raise _instead(path)

    return _newest(path, latest)


def _place_of_tag(path: Path, tag: str) -> Place:
    """The place of a tag that the user named."""
    if is_tag_folder(path) and path.resolve().name == tag:
        return Place(path.parent, path, tag)
    if not stores.is_folder(path / tag):
        raise _instead(path, tag)
    return Place(path, path / tag, tag)


def _instead(path: Path, tag: str | None = None) -> CheckpointError:
    """What lies at a path without state files, and what handles it."""
    detected = detection.detect(path, tag)
    if detected.kind.name != "deepspeed":
        return detected.error

    # its reader is this one: it has the sign of DeepSpeed, but no files
    offer = state_folders.offer(path)
    return CheckpointError(f"{path} holds no *_states.pt; {offer}", "incomplete")


def _newest(path: Path, latest: Path) -> Place:
    """The place of the tag that the file ``latest`` names."""
    tag_name = state_folders.tag_in(latest)
    if tag_name is None or not stores.is_folder(path / tag_name):
        misplaced_note = misplaced_files.file(latest)
        if misplaced_note is not None:
            raise CheckpointError(f"{latest} {misplaced_note}", "incomplete")

        stated = f"{tag_name!r}, which is not there" if tag_name else "no tag"
        offer = state_folders.offer(path)
        remedy = ": bring that folder back" if tag_name and offer == state_folders.NOTHING else ""
        raise CheckpointError(f"{latest} names {stated}; {offer}{remedy}", "incomplete")

    inner_folder = (path / tag_name).parent
    # a run's pointer names a folder with a pointer of its own: checkpoint-5/global_step5
    if inner_folder != path and stores.is_file(inner_folder / "latest"):
        return Place(inner_folder, path / tag_name, (path / tag_name).name)

    return Place(path, path / tag_name, tag_name)


def scan(place: Place) -> Files:
    """The state files of the tag.

    ``CheckpointError`` if it is of a kind that is not read.
    """
    names = stores.names(place.folder)
    detection.require_readable(place.folder)

    files = _files(place, names)
    if not files.optimizer and not files.partitioned and files.module is None:
        raise CheckpointError(
            f"{place.folder} holds no *_states.pt; {state_folders.offer(place.root)}"
            f"{misplaced_files.missing(place.folder)}",
            "incomplete",
        )

    return files


def lanes(place: Place) -> dict[int, Files]:
    """The state files of each model-parallel rank;
    ``CheckpointError`` if there are none."""
    names = stores.names(place.folder)
    names_by_rank: dict[int, list[str]] = {}
    for name in names:
        for pattern in (OPTIMIZER, PARTITIONED, MODULE):
            if match := pattern.fullmatch(name):
                names_by_rank.setdefault(int(match["mp"]), []).append(name)

    if not names_by_rank:
        raise CheckpointError(f"{place.folder} holds no *_states.pt", "incomplete")

    return {rank: _files(place, own_names) for rank, own_names in names_by_rank.items()}


def _files(place: Place, names: list[str]) -> Files:
    """The state files of these names."""
    modules = [match for name in names if (match := MODULE.fullmatch(name))]
    return Files(
        _by_rank(place, names, OPTIMIZER),
        _by_rank(place, names, PARTITIONED),
        place.folder / modules[0][0] if modules else None,
    )


def _by_rank(place: Place, names: list[str], pattern: LazyPattern[str]) -> dict[int, Path]:
    """Files of one kind, keyed by rank. The fast writer leaves identical copies; the
    first is used."""
    paths_by_rank: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue

        rank = int(match["rank"])
        if rank in paths_by_rank and match["writer"] is None:
            raise CheckpointError(
                f"{place.folder} has two files of rank {rank}, "
                f"{paths_by_rank[rank].name} and {name}: two saves are mixed; move the "
                "older one away"
            )

        paths_by_rank.setdefault(rank, place.folder / name)

    return dict(sorted(paths_by_rank.items()))
