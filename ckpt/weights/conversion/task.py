"""A conversion decided on, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckpt.weights.companions import model_folder
from ckpt.weights.companions.surroundings import config_text
from ckpt.weights.conversion import sources
from ckpt.weights.output.product import Product
from ckpt.weights.reader.verdict import LoadVerdict
from converters.options import Option
from converters.plan import Plan, Tied
from converters.source import Source
from converters.storage import stores
from converters.tensors import DType

Format = Literal["safetensors", "bin", "lightning"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Conversion:
    """A conversion decided on but not begun: what is read, what is written, and where.

    ``path`` is what the caller named the checkpoint by. ``verdict`` says whether the
    output loads in its reader. ``option_paths`` are the paths that options name, by
    option.
    """

    checkpoint: Source
    path: Path
    product: Product
    verdict: LoadVerdict
    plan: Plan
    output: Path
    dtype: str
    format: Format
    tied: Tied
    notes: tuple[str, ...] = ()
    option_paths: Mapping[Option, Path] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        source = str(self.checkpoint.place.folder)
        return f"<Conversion {source!r} to {str(self.output)!r}: {self.dtype}, {self.format}>"

    @property
    def is_file(self) -> bool:
        """Whether ``output`` is a file (``--format lightning -o x.ckpt``), not a folder."""
        if self.format != "lightning":
            return False

        from ckpt.weights.conversion import lightning  # which other formats need not

        return lightning.names_file(self.output)

    @property
    def config(self) -> bytes | None:
        """The content of config.json, with the type of the weights written."""
        config = self.product.surroundings.config
        if config is None:
            return None
        return config_text(config, model_folder.DTYPE_NAMES[main_dtype(self.plan)])

    @property
    def companions(self) -> Mapping[str, Path]:
        """The files that are copied, by their name in the output."""
        return self.product.surroundings.companions

    @property
    def texts(self) -> dict[str, bytes]:
        """The small files that are written: by their name in the output."""
        texts = dict(self.product.texts)
        config = self.config
        return texts if config is None else texts | {"config.json": config}

    @property
    def proof(self) -> str | None:
        """The name of what holds copies of the weights, if anything does."""
        return self.product.proof

    @property
    def strict(self) -> bool:
        """Whether other values in ``proof`` are an error."""
        return self.product.strict

    def remedy(self, skips: bool = True) -> str:
        """The remedy where the copies in ``proof`` have other values."""
        return sources.remedy(self.checkpoint, self.proof, skips)

    @property
    def nbytes(self) -> int:
        """Bytes of the output: shards, index and copied files."""
        return self.plan.nbytes + sum(stores.status(path).size for path in self.companions.values())


def main_dtype(plan: Plan) -> DType:
    """The floating-point type of most bytes written, without codes and constants."""
    totals: dict[DType, int] = {}
    for placement in plan.placements():
        if placement.codes:
            continue
        if placement.dtype.floating and placement.dtype.itemsize > 1:
            totals[placement.dtype] = totals.get(placement.dtype, 0) + placement.nbytes

    return max(totals, key=lambda dtype: totals[dtype], default=DType.F32)
