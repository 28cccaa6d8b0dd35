"""Whether torch's distributed checkpoints (DCP) are whole, by their ``.metadata``.

    .metadata          what all ranks wrote: written by the coordinator, last
    __R.metadata       with ``use_collectives=False``: what rank R wrote, by itself
    __R_N.distcp       the bytes of rank R

Each ``.metadata`` (``converters.dcp.metadata``) has the size of every tensor, and the
chunks of it that were written with where they are. So a missing chunk is known from the
sizes of the tensors, also where each rank described only its own.

Source of FSDP's parts of a checkpoint: accelerate 1.15 ``utils/fsdp_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.runs.ancestry import record_in
from ckpt.runs.foreign import intact_files
from ckpt.runs.foreign.proofs import OWN, Proof
from converters import detect
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import open_files
from converters.words import counted

if TYPE_CHECKING:
    from converters.dcp.entries.description import ItemPlace

FSDP_STEMS = ("pytorch_model_fsdp", "optimizer")
_NUMBER_OF_PART = LazyPattern(r"[a-z_]+?(?:_(\d{1,9}))?(?:_rank\d+)?(?:\.bin)?")
_BYTES_OF_RANK = LazyPattern(r"__(\d+)_\d+\.distcp")


@open_files.once()
def require_dcp(folder: Path) -> None:
    """``CheckpointError`` unless a folder
    of torch's distributed checkpoint has all its bytes."""
    from converters.dcp import boxes, item_forms, metadata  # which other checkpoints need not

    description = metadata.read(folder)
    _require_described(folder, description.rank_count)
    for name, tensor in description.tensors.items():
        boxes.require_numel(folder, name, tensor.shape, [chunk.sizes for chunk in tensor.chunks])

    last_places: dict[Path, ItemPlace] = {}
    for place in metadata.item_places(folder):
        last_place = last_places.setdefault(place.path, place)
        if place.offset + place.nbytes > last_place.offset + last_place.nbytes:
            last_places[place.path] = place

    for path, place in sorted(last_places.items()):
        needed_end = place.offset + place.nbytes
        file_size = path.stat().st_size if path.is_file() else None
        if file_size is None:
            raise CheckpointError(f"{path} is not there", "incomplete")
        if file_size < needed_end:
            raise CheckpointError(
                f"{path} has {file_size} bytes, expected {needed_end}; it is cut short"
            )
        item_forms.require_form(place)  # all items are looked at by ``verify --data``


def proof_of(folder: Path) -> Proof:
    """The proof of a folder of torch's distributed checkpoint, of Lightning or a loop."""
    require_dcp(folder)
    is_lightning = (folder / "meta.pt").is_file()
    if is_lightning:
        intact_files.require_torch_file(folder / "meta.pt")
    kind = "Lightning with FSDP" if is_lightning else "torch's distributed checkpoint"
    # a loop that saved its model alone goes on from that; of another one it is weights
    is_training = record_in(folder) is None or has_states(folder)

    return Proof(folder, kind, resumable=is_training)


def proof_of_parts(folder: Path) -> Proof | None:
    """The proof of FSDP's model and optimizer, which no trainer describes; ``None``: it
    has no model."""
    if not fsdp_parts(folder, "pytorch_model_fsdp"):
        return None
    if fsdp_parts(folder, "optimizer"):
        return Proof(folder, "FSDP")
    if record_in(folder) is not None:  # ckpt to-dcp, of weights alone
        return Proof(folder, OWN, resumable=False)
    raise CheckpointError(
        f"{folder} has FSDP's model, but no optimizer.bin, optimizer_0 or optimizer_0_rank0.bin "
        "beside it: its save did not finish, or no training goes on from it",
        "incomplete",
    )


def proof_of_pair(folder: Path) -> Proof | None:
    """The proof of a model and its optimizer in folders of their own; ``None``: they are
    not both there."""
    detected = detect.detect(folder)
    if detected.kind.name != "dcp-parts":
        return None
    for name in (filenames.DCP_MODEL, *filenames.DCP_OPTIMIZERS):
        if (folder / name).is_dir():
            require_dcp(folder / name)
    return Proof(folder, "torch's distributed checkpoint")


def rank_count(parts: Iterable[Path]) -> int:
    """The least number of ranks that wrote folders of DCP: replicas write nothing."""
    names = [path.name for part in parts if part.is_dir() for path in part.iterdir()]
    matches = map(_BYTES_OF_RANK.fullmatch, names)
    return max((int(match[1]) + 1 for match in matches if match is not None), default=0)


@open_files.once()
def has_states(folder: Path) -> bool:
    """Whether a folder of torch's distributed checkpoint
    holds more than the weights of a model."""
    from converters.dcp.dcp_state import DcpState
    from converters.dcp.keys import layouts

    leaves = DcpState(folder).leaves
    try:
        layout = layouts.split(leaves, folder)
    except CheckpointError:  # of several models, perhaps: nobody knows what is whose
        return True

    return len(layout.model) < len(leaves)


def _require_described(folder: Path, rank_count: int) -> None:
    """``CheckpointError`` where a rank's bytes are there, and not what describes them."""
    if (folder / ".metadata").is_file():
        return
    for path in sorted(folder.glob("*.distcp")):
        match = _BYTES_OF_RANK.fullmatch(path.name)
        if match is not None and int(match[1]) >= rank_count:
            raise CheckpointError(
                f"{folder} has no __{match[1]}.metadata, which rank {match[1]} writes last, after "
                f"{path.name}",
                "incomplete",
            )


def _require_one_form(folder: Path, stem: str) -> None:
    """``CheckpointError`` where one of the models,
    or its optimizer, is there in several forms."""
    from converters.dcp import fsdp_folder

    matches = (_NUMBER_OF_PART.fullmatch(path.name) for path in folder.glob(f"{stem}*"))
    for number in sorted({int(match[1] or 0) for match in matches if match}):
        fsdp_folder.require_one_form(folder, stem, number)


def fsdp_parts(folder: Path, stem: str) -> list[Path]:
    """The parts of FSDP's model or optimizer, each whole: folders of DCP, or files."""
    _require_one_form(folder, stem)
    part_folders = sorted(part for part in folder.glob(f"{stem}_*") if part.is_dir())
    for part in part_folders:
        require_dcp(part)
    part_files = sorted(folder.glob(f"{stem}*.bin"))
    intact_files.require_all_ranks(folder, part_files, stem + r"_0_rank(\d+)\.bin")
    files_by_stem = {name: len(list(folder.glob(f"{name}_0_rank*.bin"))) for name in FSDP_STEMS}
    rank_counts = {name: count for name, count in files_by_stem.items() if count}
    if len(set(rank_counts.values())) > 1:
        parts = [f"{name} of {counted(count, 'rank')}" for name, count in rank_counts.items()]
        raise CheckpointError(
            f"{folder} has {' and '.join(parts)}: files of one of them are missing, or of another "
            "save",
            "incomplete",
        )

    for part in part_files:
        intact_files.require_torch_file(part)

    return [*part_folders, *part_files]
