"""A user's wishes for a conversion, besides the checkpoint and the output's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from converters.errors import CheckpointError
from converters.options import (
    ADAPTER_CONFIG,
    BASE,
    CHECK,
    CONFIG,
    DEQUANTIZE,
    EXCLUDE_FROZEN,
    MERGE,
    OTHER_BASE,
    PART,
    RENAME,
    SELECT,
    STRIP,
    TOKENIZER,
    UNTIE,
    Option,
)
from converters.tensors import DType

DTYPES = {"fp32": DType.F32, "bf16": DType.BF16, "fp16": DType.F16, "keep": None}
DTYPE_NAMES = {  # what torch and transformers call them
    **{name: name for name in DTYPES},
    **{"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"},
}

Masters = Literal["fp32", "16bit"]
Check = Literal["auto", "names", "transformers", "none"]
Layout = Literal["hub", "runtime"]
Names = Literal["reader", "as-stored", "hf"]
FILE_SUFFIXES = (".toml", ".json")


@dataclass(frozen=True, slots=True)
class Naming:
    """Wishes for the names of tensors.

    ``part`` is the model of several that are saved in one, such as ``policy``. ``strip``
    are prefixes to drop, ``rename`` pairs of a regular expression and its replacement,
    both in order; ``select`` are globs of the names (after renaming) to write.
    ``as_stored`` keeps every name; ``from_framework`` gives the names of a pipeline, of
    Megatron or of AutoEP those that the model has in transformers.
    """

    part: str | None = None
    strip: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    select: tuple[str, ...] = ()
    as_stored: bool = False
    from_framework: bool = False

    @classmethod
    def of(
        cls,
        strip: str | Sequence[str] = (),
        rename: str | Mapping[str, str] | Sequence[str | tuple[str, str]] = (),
        select: str | Sequence[str] = (),
        part: str | None = None,
    ) -> Naming:
        """The wishes as functions take them: one string for one, a mapping for pairs, a
        string that ends with .toml or .json for a file of these.

        ``CheckpointError`` (kind "refused") for anything else.
        """
        if isinstance(rename, Mapping):
            rename = tuple(rename.items())
        pairs = (rename,) if isinstance(rename, str) else tuple(rename)
        strips = (strip,) if isinstance(strip, str) else tuple(strip)
        selects = (select,) if isinstance(select, str) else tuple(select)
        if not all(isinstance(text, str) for text in (*strips, *selects, part or "")):
            raise CheckpointError("strip, select and part are strings", "refused")

        return cls(part, strips, tuple(pair for each in pairs for pair in _pairs(each)), selects)

    def with_names(self, names: str) -> Naming:
        """The same for a value of the option ``--names``."""
        return replace(self, as_stored=names == "as-stored", from_framework=names == "hf")

    @property
    def changes(self) -> bool:
        """Whether any name is to change, or a tensor to be left out."""
        return bool(self.part or self.strip or self.rename or self.select)


def _pairs(rename: str | Sequence[str]) -> list[tuple[str, str]]:
    """A regular expression and its replacement, also from OLD=NEW as in commands; or
    those of a file."""
    if isinstance(rename, str):
        if rename.endswith(FILE_SUFFIXES):
            return pairs_of_file(Path(rename))
        old, equals, new = rename.rpartition("=")
        if equals:
            return [(old, new)]
    elif len(rename) == 2 and all(isinstance(text, str) for text in rename):
        return [(rename[0], rename[1])]

    raise CheckpointError(
        f"rename {rename!r} is not a pair of a regular expression and its replacement: "
        "give {'old': 'new'}, [('old', 'new')] or 'old=new'",
        "refused",
    )


def pairs_of_file(path: Path) -> list[tuple[str, str]]:
    """The regular expressions and replacements of a file, in order.

    ``CheckpointError`` (kind "refused") for what is no such file.
    """
    from converters.storage import settings_file  # which most requests need not

    content = settings_file.read(path, "'regular expression' = 'replacement'")
    table = content.get("rename", content)
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise CheckpointError(
            f"{path} has other values than texts; expected 'regular expression' = 'replacement'",
            "refused",
        )
    return list(table.items())


@dataclass(frozen=True, slots=True)
class Request:
    """Wishes for a conversion.

    naming             wishes for names
    weights            the fp32 masters, or the 16-bit weights of the model file
    merge              writes a model with its adapter merged in
    base               folder of the base model
    other_base         merges into a base whose values differ from the frozen copy
    adapter_config     PEFT's adapter_config.json, or its folder
    config, tokenizer  folders or files to take in place of the checkpoint's own
    dequantize         writes packed weights as numbers
    check              who judges whether the output loads: the table of names, the installed
                       transformers, nobody, or the table and transformers where the table
                       has doubts ("auto")
    untie              writes ``tie_word_embeddings: false``, and both of two tied tensors
    unsupported_types  tensors of an element type that no writer has are left out with a
                       note ("skip"), or copied as bytes ("raw")
    dtype              the element type to write, a key of ``DTYPES``
    drops_ties         leaves out every tied name, whatever the reader makes of that
    exclude_frozen     leaves out the parameters that are not trained
    layout             names and shapes as ``save_pretrained`` writes them ("hub"), where that
                       is known of the model, or those of the running model ("runtime")
    tp_rules           a file that says how parameters were cut for tensor parallelism
    """

    naming: Naming = field(default_factory=Naming)
    weights: Masters = "fp32"
    merge: bool = False
    base: Path | None = None
    other_base: bool = False
    adapter_config: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    dequantize: bool = False
    check: Check = "names"
    untie: bool = False
    unsupported_types: Literal["skip", "raw"] = "skip"
    dtype: str = "fp32"
    drops_ties: bool = False
    exclude_frozen: bool = False
    layout: Layout = "hub"
    tp_rules: Path | None = None

    @property
    def paths(self) -> dict[Option, Path]:
        """The folders and files that are named, by option."""
        options = {
            CONFIG: self.config,
            TOKENIZER: self.tokenizer,
            BASE: self.base,
            ADAPTER_CONFIG: self.adapter_config,
        }
        return {option: path for option, path in options.items() if path is not None}

    def refuse(self, unfit: Sequence[Option], situation: str) -> None:
        """Raises if one of the options ``unfit`` is given, as it would be ignored."""
        naming = self.naming
        options: dict[Option, object] = {
            MERGE: self.merge,
            DEQUANTIZE: self.dequantize,
            PART: naming.part,
            SELECT: naming.select,
            STRIP: naming.strip,
            RENAME: naming.rename,
            UNTIE: self.untie,
            OTHER_BASE: self.other_base,
            EXCLUDE_FROZEN: self.exclude_frozen,
            CHECK: self.check == "transformers",
            **self.paths,
        }
        for option, value in options.items():
            if value and option in unfit:
                spelling = option("transformers") if option is CHECK else str(option)
                raise CheckpointError(
                    f"{spelling} does not go with {situation}; leave one of them out",
                    "refused",
                )
