"""Every element type of torch in every layout that torch saves: read as ``torch.load`` reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch

import ckpt

DTYPES = {str(each)[6:]: each for each in vars(torch).values() if isinstance(each, torch.dtype)}
QUANTIZED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")  # those are in test_opened_values
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Make = Callable[[torch.dtype], torch.Tensor]


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any bytes that are no NaN."""
    octets = torch.arange(prod(shape) * dtype.itemsize) % 2
    return octets.to(torch.uint8).view(dtype).reshape(shape)


def compressed(layout: torch.layout, *block: int) -> Make:
    def make(dtype: torch.dtype) -> torch.Tensor:
        values = numbers(dtype, 3, *block)
        columns = torch.tensor([0, 1, 2])
        return torch.sparse_compressed_tensor(
            torch.tensor([0, 1, 2, 3]), columns, values, (3, 3), layout=layout
        )

    return make


LAYOUTS: dict[str, Make] = {
    "plain": lambda dtype: numbers(dtype, 4, 6),
    "scalar": lambda dtype: numbers(dtype, 1).reshape(()),
    "nothing": lambda dtype: numbers(dtype, 0, 3),
    "transposed": lambda dtype: numbers(dtype, 4, 6).t(),
    "slice": lambda dtype: numbers(dtype, 4, 6)[1:3, 2::2],
    "expanded": lambda dtype: numbers(dtype, 1, 6).expand(4, 6),
    "repeated": lambda dtype: numbers(dtype, 1).expand(70_000),
    "channels last": lambda d: numbers(d, 2, 3, 2, 2).to(memory_format=torch.channels_last),
    "parameter": lambda dtype: torch.nn.Parameter(numbers(dtype, 3), requires_grad=False),
    "other type": lambda dtype: numbers(dtype, 4).view(torch.int8),
    "negated": lambda dtype: torch._neg_view(numbers(dtype, 4)),
    "conjugated": lambda dtype: numbers(dtype, 4).conj() if dtype.is_complex else numbers(dtype, 4),
    "meta": lambda dtype: torch.empty(3, 2, dtype=dtype, device="meta"),
    "coo": lambda dtype: torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 1], [2, 2, 0]]), numbers(dtype, 3), (4, 6)
    ),
    "coo of rows": lambda dtype: torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 1]]), numbers(dtype, 3, 2), (4, 2)
    ),
    "csr": compressed(torch.sparse_csr),
    "csc": compressed(torch.sparse_csc),
    "bsr": compressed(torch.sparse_bsr, 1, 1),
    "bsc": compressed(torch.sparse_bsc, 1, 1),
    "nested": lambda dtype: torch.nested.nested_tensor([numbers(dtype, 2), numbers(dtype, 3)]),
    "jagged": lambda dtype: torch.nested.nested_tensor(
        [numbers(dtype, 2), numbers(dtype, 3)], layout=torch.jagged
    ),
}
NEVER_READ = {  # by torch itself: torch.load of a file in the old form
    "nested": "sizes that are not there (RuntimeError)",
}


def parts(tensor: torch.Tensor) -> Iterator[bytes | torch.Size | bool]:
    """What makes a tensor: bytes of its elements, or of what it is made of."""
    if tensor.is_nested:
        for row in tensor.unbind():
            yield from parts(row)
    elif tensor.device.type == "meta":
        yield tensor.shape
    elif tensor.layout is torch.sparse_coo:
        yield tensor.is_coalesced()
        yield from parts(tensor._indices())
        yield from parts(tensor._values())
    elif tensor.layout is not torch.strided:
        is_by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        for part in ("crow", "col") if is_by_row else ("ccol", "row"):
            yield from parts(getattr(tensor, f"{part}_indices")())
        yield from parts(tensor.values())
    else:
        yield tensor.shape
        yield octets(tensor)


def octets(tensor: torch.Tensor) -> bytes:
    try:
        tensor = tensor.detach().resolve_conj().resolve_neg()
    except RuntimeError:  # types that have no negation stay views
        return bytes((tensor.is_neg(), *tensor.untyped_storage()))
    if tensor.dtype.itemsize == 16:
        tensor = torch.view_as_real(tensor)
    if not tensor.numel():
        return b""
    flat = tensor if tensor.dim() else tensor.reshape(1)
    return flat.view(INTEGERS[flat.dtype.itemsize]).contiguous().numpy().tobytes()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_type_in_a_layout_is_read_as_torch_load_reads_it(
    layout: str, legacy: bool, tmp_path: Path
) -> None:
    path, count = tmp_path / "x.pt", 0
    warnings.simplefilter("ignore")
    for name, dtype in DTYPES.items():
        if name in QUANTIZED:
            continue
        try:
            saved = LAYOUTS[layout](dtype)
            torch.save({"w": saved}, path, _use_new_zipfile_serialization=not legacy)
            theirs = torch.load(path, weights_only=True)["w"]
        except (RuntimeError, TypeError, AttributeError, LookupError):  # torch itself does not
            continue

        with ckpt.open(path) as opened:
            ours = opened["w"]
        assert isinstance(ours, torch.Tensor)
        facts = [(each.dtype, each.layout, each.device) for each in (ours, theirs)]
        assert facts[0] == facts[1], name
        assert list(parts(ours)) == list(parts(theirs)), name
        count += 1

    assert count >= (12 if legacy else 20) or layout in NEVER_READ
