"""The files that a training without DeepSpeed saves: whose they are,
and whether states are there.

    optimizer.pt  model.safetensors           the Trainer with DDP or alone
    optimizer.bin  model.safetensors          Accelerate with DDP or alone
    optimizer_0/  pytorch_model_fsdp_0/       FSDP, a DCP folder each: __R_N.distcp is of rank R
    optimizer.bin  pytorch_model_fsdp.bin     FSDP with FULL_STATE_DICT
    optimizer_0_rankR.bin                     FSDP with use_dcp=False

Source: transformers 5.23 ``trainer.py: _save_optimizer_and_scheduler``, accelerate 1.15
``utils/fsdp_utils.py``.
"""

from __future__ import annotations

from pathlib import Path

from ckpt.runs.manifest import FileRecord, digest
from converters.errors import CheckpointError
from converters.storage import local

# Of rank R, in the folder or in one of FSDP's.
_OWN_FORMS = ("*/__{}_*.distcp", "*_rank{}.bin", "random_states_{}.pkl")
_OPTIMIZER_FORMS = ("optimizer.pt", "optimizer.bin", "optimizer_*")


def sync_own(folder: Path, rank: int) -> dict[str, FileRecord]:
    """Puts on disk what this rank alone has written, so that all ranks do it at once.

    Returns the digests by the names in ``folder``.
    """
    files = {}
    for form in _OWN_FORMS:
        for path in sorted(folder.glob(form.format(rank))):
            local.sync_file(path)
            files[path.relative_to(folder).as_posix()] = digest(path)

    return files


def require_states(folder: Path) -> None:
    """``CheckpointError`` unless an optimizer's state
    is in what is to be a full checkpoint."""
    if not any(any(folder.glob(form)) for form in _OPTIMIZER_FORMS):
        raise CheckpointError(
            f"{folder} has no optimizer.pt, optimizer.bin or optimizer_0, where the optimizer's "
            "state of this step should be; see whether the Trainer's _save_checkpoint is replaced "
            "by one that saves none: nothing could resume from what it saves",
            "output",
        )
