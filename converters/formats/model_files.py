"""The files that a model's weights lie in,
by name, and who reads them: one table for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from converters.detect import filenames
from converters.formats import safetensors
from converters.tensors import Weights

Reader = Callable[[Path], Weights]


def _torch_bin(path: Path) -> Weights:
    from converters.formats import pytorch_bin  # which few folders need by now

    return pytorch_bin.read(path)


# The names of one file, and of the index of shards, with what reads either.
_READERS: tuple[tuple[tuple[str, str], Reader], ...] = (
    (filenames.SAFETENSORS, safetensors.read),
    (filenames.TORCH_BIN, _torch_bin),
)
# One file counts before an index of shards, which an older save may have left:
# transformers 5.23 looks in this order
# (``modeling_utils.py: _get_resolved_checkpoint_files``).
READERS: Mapping[str, Reader] = {name: read for names, read in _READERS for name in names}
