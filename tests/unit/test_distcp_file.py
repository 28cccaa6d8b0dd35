"""A rank's file of a distributed checkpoint: each item is what ``torch.save`` writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from heavy_libraries import LateModule

from ckpt.runs.digests import unlike
from converters.errors import CheckpointError
from converters.torch_files.zip_headers import ALIGNMENT

torch: Any = LateModule("torch")
distcp_file: Any = LateModule("ckpt.state.distcp_file")
boxes: Any = LateModule("ckpt.torch_training.boxes")
model_tensors: Any = LateModule("ckpt.torch_training.model_tensors")


def tensors() -> list[Any]:
    return [
        torch.arange(24.0).reshape(4, 6)[1:3],  # a part of its storage
        torch.arange(400_000.0).reshape(2, -1),  # written from where it is
        torch.arange(30, dtype=torch.float32).reshape(5, 6).t(),  # of other strides
        torch.tensor(7.0),
        torch.zeros(0, 3),
        torch.ones(3, dtype=torch.bool),
        torch.linspace(0, 1, 999).to(torch.bfloat16),
        torch.ones(3, dtype=torch.complex64),
    ]


def test_items_are_files_of_torch_save(tmp_path: Path) -> None:
    file = distcp_file.DistcpFile()
    values = tensors()
    spans = [file.add_tensor(value) for value in values]
    options = [0.1, (0.9, 0.999), None, ["a", "b"]]
    spans += [file.add_object(option) for option in options]
    path = tmp_path / "__0_0.distcp"
    written: list[int] = []
    record = file.write(path, written.append)

    data = path.read_bytes()
    assert len(data) == record.size == file.size(path) == sum(written)
    assert record.kind == "crc32" and unlike(path, record, True, written.append) is None
    for value, span in zip([*values, *options], spans, strict=True):
        item = io.BytesIO(data[span.offset : span.offset + span.nbytes])
        loaded = torch.load(item, weights_only=True)
        assert torch.equal(loaded, value) if isinstance(value, torch.Tensor) else loaded == value
    large = spans[1]
    payload = data.index(values[1].numpy().tobytes()[:4096], large.offset)
    assert payload % ALIGNMENT == 0


def test_what_is_small_and_equal_is_there_once() -> None:
    file = distcp_file.DistcpFile()
    first, second = (file.add_tensor(torch.tensor(3.0)) for _ in range(2))
    assert first == second and file.add_tensor(torch.tensor(4.0)) != first
    assert file.add_object(0.1) == file.add_object(0.1)


def test_a_copy_is_written_in_place_of_what_the_training_changes(tmp_path: Path) -> None:
    file = distcp_file.DistcpFile()
    value = torch.arange(1000.0)
    span = file.add_tensor(value)
    file.replace(0, value.clone().view(torch.uint8).numpy().data)
    value.zero_()
    with pytest.raises(ValueError, match="another size"):
        file.replace(0, memoryview(b"short"))
    file.write(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    loaded = torch.load(io.BytesIO(data[span.offset :]), weights_only=True)
    assert torch.equal(loaded, torch.arange(1000.0))
    assert file.end_of_storage(tmp_path / "file", 0) < len(data)


def test_ranks_write_every_element_of_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are shared by rows; what is not cut by rows is refused."""
    weights = {"large": torch.arange(601 * 1000.0).reshape(601, 1000), "small": torch.ones(3)}
    written = {name: torch.zeros(value.numel()) for name, value in weights.items()}
    for rank in range(3):
        for piece in model_tensors.pieces(weights, rank, 3):
            target = written[piece.name][piece.start : piece.start + piece.values.numel()]
            target += piece.values + 1
    for name, value in weights.items():
        assert torch.equal(written[name], value.reshape(-1) + 1), name

    columns = boxes.LocalBox((0, 2), (601, 2), weights["large"][:, 2:4])
    monkeypatch.setattr("ckpt.torch_training.boxes.Owners.boxes", lambda *_: [columns])
    with pytest.raises(CheckpointError, match="large is not cut by rows"):
        list(model_tensors.pieces(weights, 0, 1))
