"""The functions of ``deepspeed.utils.zero_to_fp32`` under the same names,
for a script to import.

    from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint

Same arguments and meaning as in DeepSpeed 0.19.8, and in 0.14, which wrote one file;
what is better is listed in docs/recovery.md. The file runs as a script too, with the
arguments of the ``zero_to_fp32.py`` that DeepSpeed leaves in a checkpoint. What cannot
be read is a ``CheckpointError``, one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ckpt import requirements
from ckpt.folders import scratch
from ckpt.folders.filenames import MANIFEST
from ckpt.runs import manifest
from ckpt.weights import arguments
from ckpt.weights.companions import surroundings
from ckpt.weights.naming import ties
from ckpt.weights.opening import tensors as opened_tensors
from ckpt.weights.opening import unusual
from ckpt.weights.request import DTYPE_NAMES, DTYPES
from converters.detect import detection
from converters.detect.deepspeed import PARALLEL
from converters.errors import CheckpointError, one_line, shortage
from converters.execute import shards
from converters.formats import pytorch_bin, safetensors
from converters.names import selection
from converters.options import of_commands, using
from converters.plan import WHOLE, output_dtype, parse_size
from converters.source import Source
from converters.storage import local
from converters.storage.local_store import LOCAL
from converters.storage.store import output_path
from converters.tensors import DType, TensorRef, Weights
from converters.zero import checkpoint

if TYPE_CHECKING:
    import torch

AnyPath = str | os.PathLike[str]
SAFETENSORS, BIN = "model{suffix}.safetensors", "pytorch_model{suffix}.bin"
_FILES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")  # ends of the name of one file of weights
_STATES = (  # names of what a training goes on from
    *("*_states.pt", "rng_state*", "random_states_*", "optimizer*", "scheduler*"),
    *("training_args.bin", "extra_state_*"),
)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor located; ``contiguous()`` reads it."""

    ref: TensorRef
    output: DType

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        import torch

        return torch.Size(self.ref.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type once it is read."""
        return opened_tensors.torch_dtype(self.output)

    def contiguous(self) -> torch.Tensor:
        """The tensor, read now."""
        import torch

        return torch.as_tensor(opened_tensors.read(self.ref, self.output, "pt"))


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: AnyPath,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The state dict in fp32 on the CPU; tied names are one tensor.

    ``lazy_mode`` gives tensors that are read by ``contiguous()``.
    """
    requirements.require_torch("ckpt.zero_to_fp32")
    with arguments.naming_arguments("tag="):
        source = _source(checkpoint_dir, tag)
    weights = _weights(source.weights, exclude_frozen_parameters)
    lazy = {
        name: LazyTensor(ref, output_dtype(name, weights, DType.F32))
        for name, ref in weights.tensors.items()
    }
    state_dict: dict[str, Any] = (
        dict(lazy) if lazy_mode else {name: tensor.contiguous() for name, tensor in lazy.items()}
    )
    state_dict |= {alias: state_dict[owner] for alias, owner in weights.aliases.items()}
    # buffers of types that only torch has
    state_dict |= {name: tensor.read("pt") for name, tensor in unusual.tensors_of(source).items()}

    return {name: state_dict[name] for name in source.weights.order if name in state_dict}


def _source(checkpoint_dir: AnyPath, tag: str | None) -> Source:
    """The states of a training with ZeRO, and those of more parallelism than that."""
    detected = detection.detect(checkpoint_dir, tag)
    if detected.kind.name in PARALLEL:
        return detected.read()
    try:
        return checkpoint.weights(checkpoint_dir, tag)
    except checkpoint.ExpertsError:
        return detected.read()


def _weights(weights: Weights, exclude_frozen: bool) -> Weights:
    """The weights, without the frozen parameters if they are not asked for."""
    return selection.without_frozen(weights) if exclude_frozen else weights


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: AnyPath,
    output_dir: AnyPath,
    dtype: torch.dtype | str = "float32",
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes ``pytorch_model.bin`` or ``model.safetensors``,
    in shards with an index if larger.

    Only these files are written, each whole or not at all, the index last; whatever else
    lies in ``output_dir`` stays. For a complete model folder: ``ckpt.convert`` or
    ``ckpt to-fp32``.

    An ``output_dir`` that ends as a file of weights does (.bin, .pt, .safetensors) is
    that file, as before DeepSpeed 0.15.3: all weights are written into it, and one that
    exists is replaced when the new one is complete. ``CheckpointError`` if a folder
    cannot be made there.
    """
    target_dtype = DTYPES.get(arguments.known_dtype(dtype) or "")
    if target_dtype is None:
        choices = ", ".join(name for name, key in DTYPE_NAMES.items() if DTYPES[key])
        raise ValueError(f"unsupported output dtype {dtype!r}; choose one of {choices}")
    max_shard_bytes = WHOLE if max_shard_size is None else parse_size(max_shard_size)
    with arguments.naming_arguments("tag="):
        source = _source(checkpoint_dir, tag)
        place = output_path(output_dir)
        _convert(
            source,
            place,
            target_dtype,
            max_shard_bytes,
            as_safetensors=safe_serialization,
            exclude_frozen=exclude_frozen_parameters,
        )


def _convert(
    source: Source,
    output: Path,
    target_dtype: DType,
    max_shard_bytes: int,
    as_safetensors: bool,
    exclude_frozen: bool,
) -> list[Path]:
    """Writes the weights; the files that were written, the index last."""
    weights = _weights(source.weights, exclude_frozen)
    folder, file = _place(output)
    if file is not None:
        is_named_so = file.endswith(".safetensors")
        if as_safetensors and not is_named_so:
            raise CheckpointError(
                f"{output} is named as a file of torch.save, and safetensors are asked for "
                "(safe_serialization); name a folder, or a file that ends in .safetensors",
                "output",
            )
        as_safetensors, max_shard_bytes = is_named_so, WHOLE
    if as_safetensors:
        spare = ties.spared(weights, source.place.root, surroundings.config_of(source.place))
        weights = ties.without_spared(weights, spare)
        plan = safetensors.plan(weights, target_dtype, max_shard_bytes, "keep", file or SAFETENSORS)
    else:
        plan = pytorch_bin.plan(weights, target_dtype, max_shard_bytes, "keep", file or BIN)
    paths = [folder / shard.filename for shard in plan.shards]
    for path in paths:
        _require_replaceable(path)
    # all ranks of a training may be at it at once, as DeepSpeed's own function lets them
    with scratch.folder_for(paths[0]) as scratch_folder:
        shards.execute(plan, scratch_folder, shards.CheckOptions(allow_overflow=True))
        if plan.index is not None:
            name, content = plan.index
            local.write_file(scratch_folder / name, content)
            paths.append(folder / name)
        for path in paths:
            LOCAL.replace(scratch_folder / path.name, path)

    return paths


def _require_replaceable(path: Path) -> None:
    """``CheckpointError`` for a file that a training saved and goes on from.

    Weights beside them are what users ask to have written again, unless a manifest has
    their digests.
    """
    folder = next((parent for parent in path.parents if (parent / MANIFEST).is_file()), path.parent)
    try:
        committed_names: Collection[str] = manifest.read(folder).files
    except CheckpointError:
        committed_names = ()

    is_committed = path.relative_to(folder).as_posix() in committed_names
    is_state = any(fnmatchcase(path.name, pattern) for pattern in _STATES)
    if path.exists() and (is_committed or is_state):
        raise CheckpointError(
            f"{path} is a file of the checkpoint, which a training goes on from; name another one",
            "output",
        )


def _place(output: Path) -> tuple[Path, str | None]:
    """The folder to write into, which is made,
    and the pattern of the one file if that is named."""
    file = None
    if output.suffix in _FILES and not output.is_dir():
        file = output.name.replace("{", "{{").replace("}", "}}")
        output = output.parent
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CheckpointError(
            f"{output} is a file; name a folder, or a file that ends in {', '.join(_FILES)}",
            "output",
        ) from error
    return output, file


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: AnyPath,
    output_dir: AnyPath | None = None,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    *,
    output_file: AnyPath | None = None,
) -> None:
    """``convert_zero_checkpoint_to_state_dict`` in fp32.

    The arguments of DeepSpeed before 0.15.3 are taken too: ``output_file``, and after
    it, by position, ``tag`` and ``exclude_frozen_parameters``. Then it is one file.
    """
    output = output_file if output_dir is None else output_dir
    if output is None:
        raise TypeError("convert_zero_checkpoint_to_fp32_state_dict: output_dir is not given")

    if isinstance(max_shard_size, str) and (Path(checkpoint_dir) / max_shard_size).is_dir():
        tag, exclude_frozen_parameters = max_shard_size, safe_serialization
        max_shard_size, safe_serialization = None, False

    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output,
        "float32",
        max_shard_size,
        safe_serialization,
        tag,
        exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: AnyPath, tag: str | None = None
) -> torch.nn.Module:
    """Puts the model on the CPU and the checkpoint's weights into it,
    parameter by parameter.

    Each is read straight into the model's own storage, in the model's own type. What
    DeepSpeed made of the model (ZeRO-3 placeholders, hooks) is undone, so that it is an
    ordinary model again; the engine must not be used any more. What the checkpoint does
    not hold stays as it is where it is frozen in the model (the base model under an
    adapter) or a buffer, with a warning. ``CheckpointError`` if a trained parameter of
    the model got no value, or any has another shape; nothing has been changed then.
    """
    from ckpt.weights.opening import load_into

    with arguments.naming_arguments("tag="):
        return load_into.load(model, _source(checkpoint_dir, tag))


def main(argv: list[str] | None = None) -> None:
    """The script: ``python -m ckpt.zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR``.

    It prints the paths of the files that it wrote.
    """
    options = _parser().parse_args(argv)
    try:
        with using(of_commands):
            paths = _convert(
                checkpoint.weights(Path(options.checkpoint_dir), options.tag),
                Path(options.output_dir),
                DType.F32,
                arguments.shard_bytes(options.max_shard_size, "output"),
                options.safe_serialization,
                options.exclude_frozen_parameters,
            )
    except CheckpointError as error:
        _fail(str(error), options.debug)
    except OSError as error:
        sentence = shortage(error) or str(error)
        _fail(sentence, options.debug)

    for path in paths:
        print(one_line(path))


def _parser() -> argparse.ArgumentParser:
    """The arguments of DeepSpeed's script, of all versions."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32", description="Convert a ZeRO checkpoint to fp32 weights."
    )
    parser.add_argument("checkpoint_dir", help="the checkpoint, such as path/checkpoint-12")
    parser.add_argument(
        "output_dir", help="the folder to write into, or one file such as pytorch_model.bin"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="such as 5GB or 500MB")
    parser.add_argument(
        "--safe_serialization", action="store_true", help="safetensors instead of .bin"
    )
    parser.add_argument("-t", "--tag", help="the tag to read instead of the one latest names")
    parser.add_argument(
        "-e",
        "--exclude_frozen_parameters",
        action="store_true",
        help="leave out the parameters that are not trained",
    )
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error arose")
    return parser


def _fail(message: str, debug: bool) -> NoReturn:
    """Prints one line on stderr and exits with 1."""
    if debug:
        traceback.print_exc()
    print(f"zero_to_fp32: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
