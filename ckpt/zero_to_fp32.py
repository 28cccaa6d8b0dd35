"""The functions of ``deepspeed.utils.zero_to_fp32`` under the same names, for a script to import.

    from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint

Same arguments and meaning as in DeepSpeed 0.19.8; what is better is listed in docs/recovery.md. The
file runs as a script too, with the arguments of the ``zero_to_fp32.py`` that DeepSpeed leaves in a
checkpoint. What cannot be read is a ``CheckpointError``, one line.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt import model_folder, opened
from converters import files, safetensors, stream, torchbin, zero
from converters.errors import CheckpointError
from converters.plan import output_dtype, parse_size
from converters.tensors import DType, TensorRef, Weights

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float32": DType.F32,
    "float": DType.F32,
    "fp32": DType.F32,
    "float16": DType.F16,
    "half": DType.F16,
    "fp16": DType.F16,
    "bfloat16": DType.BF16,
    "bf16": DType.BF16,
}
MOST = 1 << 62  # bytes of a shard where none is to be cut


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
        return opened.torch_dtype(self.output)

    def contiguous(self) -> torch.Tensor:
        """The tensor, read now."""
        import torch

        return torch.as_tensor(opened.read(self.ref, self.output, "pt"))


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The state dict in fp32 on the CPU; tied names are one tensor.

    ``lazy_mode`` gives tensors that are read by ``contiguous()``.
    """
    weights = _weights(zero.read(Path(checkpoint_dir), tag).weights, exclude_frozen_parameters)
    lazy = {
        name: LazyTensor(ref, output_dtype(name, weights, DType.F32))
        for name, ref in weights.tensors.items()
    }
    found: dict[str, Any] = (
        dict(lazy) if lazy_mode else {name: held.contiguous() for name, held in lazy.items()}
    )
    found |= {alias: found[owner] for alias, owner in weights.aliases.items()}
    return {name: found[name] for name in weights.order if name in found}


def _weights(weights: Weights, exclude_frozen: bool) -> Weights:
    """The weights, without the frozen parameters if they are not wanted."""
    if not exclude_frozen:
        return weights
    tensors = {n: ref for n, ref in weights.tensors.items() if n not in weights.frozen}
    aliases = {alias: owner for alias, owner in weights.aliases.items() if owner in tensors}
    return replace(weights, tensors=tensors, aliases=aliases)


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype | str = "float32",
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes ``pytorch_model.bin`` or ``model.safetensors``, in shards with an index if larger.

    Only these files are written, each whole or not at all, the index last; whatever else lies in
    ``output_dir`` stays. For a complete model folder: ``ckpt.convert`` or ``ckpt to-fp32``.
    """
    wanted = _DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if wanted is None:
        raise ValueError(f"unsupported output dtype {dtype!r}; choose of {', '.join(_DTYPES)}")
    source = zero.read(Path(checkpoint_dir), tag)
    weights = _weights(source.weights, exclude_frozen_parameters)
    most = MOST if max_shard_size is None else parse_size(str(max_shard_size))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if safe_serialization:
        tied = model_folder.tied_default(source.place.root, weights)
        plan = safetensors.plan(weights, wanted, most, tied)
    else:
        plan = torchbin.plan(weights, wanted, most, "keep")
    for shard in plan.shards:  # of another conversion, perhaps: never taken for this one's
        (folder / shard.filename).unlink(missing_ok=True)
    stream.execute(plan, folder, allow_overflow=True)
    if plan.index is not None:
        name, content = plan.index
        files.write_file(folder / name, content)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """``convert_zero_checkpoint_to_state_dict`` in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output_dir,
        "float32",
        max_shard_size,
        safe_serialization,
        tag,
        exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> torch.nn.Module:
    """Puts the model on the CPU and the checkpoint's weights into it, parameter by parameter.

    Each is read straight into the model's own storage, in the model's own type. What DeepSpeed made
    of the model (ZeRO-3 placeholders, hooks) is undone, so that it is an ordinary model again; the
    engine must not be used any more. ``CheckpointError`` if a parameter of the model got no value
    or has another shape; nothing has been changed then.
    """
    from ckpt import loading

    return loading.load(model, zero.read(Path(checkpoint_dir), tag))


def main(argv: list[str] | None = None) -> None:
    """The script: ``python -m ckpt.zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR``."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32", description="Convert a ZeRO checkpoint to fp32 weights."
    )
    parser.add_argument("checkpoint_dir", help="the checkpoint, such as path/checkpoint-12")
    parser.add_argument("output_dir", help="the folder to write into")
    parser.add_argument("--max_shard_size", default="5GB", help="such as 5GB or 500MB")
    parser.add_argument(
        "--safe_serialization", action="store_true", help="safetensors instead of .bin"
    )
    parser.add_argument("-t", "--tag", help="the tag to read instead of the one latest names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted, and without effect")
    given = parser.parse_args(argv)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            given.checkpoint_dir,
            given.output_dir,
            given.max_shard_size,
            given.safe_serialization,
            given.tag,
            given.exclude_frozen_parameters,
        )
    except (CheckpointError, ValueError) as error:
        print(f"zero_to_fp32: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
