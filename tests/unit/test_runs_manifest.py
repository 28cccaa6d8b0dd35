"""Manifests and digests: what they bind, and what they refuse."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hardening.corruption import records
from hardening.scenes import called
from hypothesis import given
from hypothesis import strategies as st
from oracles import FIXTURES
from run_folders import SOURCE, listed, real

from ckpt.folders import filenames
from ckpt.runs import manifest
from ckpt.runs.manifest import FileRecord
from ckpt.runs.run import Run
from converters.errors import CheckpointError

PLAIN = replace(
    records.WHOLE,
    created=1.5,
    versions={},
    metrics={"eval_loss": 1.9, "perplexity": math.nan, "worst": math.inf, "least": -math.inf},
    progress={"lr": [1e-3], "loss_scale": None},
)
HERE = Path("out/checkpoint-500/manifest.json")


def test_a_manifest_is_read_as_it_was_written() -> None:
    found = manifest.loads(PLAIN.dumps(), HERE)
    assert found.dumps() == PLAIN.dumps() and list(found.files) == sorted(PLAIN.files)
    assert math.isnan(found.metrics["perplexity"]) and found.metrics["worst"] == math.inf
    assert replace(found, metrics={}) == replace(PLAIN, metrics={})


def undigested() -> dict[str, Any]:
    """A manifest as it was before they had digests."""
    held: dict[str, Any] = json.loads(PLAIN.dumps())
    del held["digest"]
    return held


def test_a_manifest_of_old_without_a_digest_is_valid() -> None:
    found = manifest.loads(json.dumps(undigested()).encode(), HERE)
    assert found.dumps() == PLAIN.dumps()


def test_a_manifest_written_by_another_hand_is_the_same_manifest() -> None:
    """Order, spaces, escapes and the spelling of numbers do not count."""
    held = dict(reversed(json.loads(PLAIN.dumps()).items()))
    text = json.dumps(held, indent=7).replace('"full"', '"f\\u0075ll"').replace("1.9", "19e-1")
    assert manifest.loads(text.encode(), HERE).dumps() == PLAIN.dumps()


def test_progress_with_keys_that_json_makes_text_has_the_digest_of_what_is_read() -> None:
    held = replace(PLAIN, progress={10: 1, 9: 2, "x": {2: 3, 11: (4, math.nan)}})  # type: ignore[dict-item]
    found = manifest.loads(held.dumps(), HERE)
    assert found.progress["10"] == 1 and found.progress["x"]["11"] == [4, "nan"]


def test_a_changed_digit_of_a_metric_is_found_by_every_command(tmp_path: Path) -> None:
    """It was not, and the best checkpoint of a run could be another one."""
    run = tmp_path / "run"
    for step in (2, 4):
        real(run, step, {"eval_loss": 1.0 + step})
    path = run / "checkpoint-2" / filenames.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"eval_loss": 3.0', b'"eval_loss": 9.0'))
    with pytest.raises(CheckpointError, match="its digest is sha256:") as error:
        manifest.read(run / "checkpoint-2")
    assert error.value.kind == "corrupt"
    code, said = called("verify", run / "checkpoint-2")
    assert code == 1
    assert called("ls", run)[0] == 0 and Run(run).newest().step == 4  # type: ignore[union-attr]
    code, said = called("latest", run, "--set", "checkpoint-2")
    assert code == 1 and "its digest is" in said and said.count("\n") == 1


def test_every_bit_of_a_manifest_is_what_it_was_or_the_manifest_is_refused() -> None:
    refused, same, wrong = records.each_bit()
    assert wrong == []
    assert refused > 40 * same > 0  # spaces, the digest's own name, capital letters of an exponent


def test_it_is_json_that_any_reader_takes() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    held = json.loads(PLAIN.dumps(), parse_constant=refuse)
    assert held["format"] == 1 and held["metrics"]["perplexity"] == "nan"


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": True},
        {"step": "5"},
        {"tier": "some"},
        {"tag": None},
        {"tag": "../elsewhere"},
        {"save": "not hex"},
        {"created": "now"},
        {"created": 10**400},
        {"stage": 7},
        {"world_size": 0},
        {"node": 1},
        {"nodes": 0},
        {"versions": {"ckpt": 1}},
        {"versions": []},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": True}},
        {"progress": 3},
        {"files": {"../secret": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {"/etc/passwd": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {"a//b": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {"a/./b": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {"a\0b": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {"manifest.json": {"size": 1, "digest": "crc32:00000000"}}},
        {"files": {".pinned": {"size": 0, "digest": "crc32:00000000"}}},
        {"files": {"a": {"size": -1, "digest": "crc32:00000000"}}},
        {"files": {"a": {"size": 1, "digest": "md5:00"}}},
        {"files": {"a": {"size": 1}}},
        {"files": {"a": None}},
        {"format": 2},
        {"format": None},
    ],
    ids=str,
)
def test_a_manifest_that_says_what_cannot_be_is_refused(change: dict[str, object]) -> None:
    held = undigested() | change
    with pytest.raises(CheckpointError, match=r"out/checkpoint-500/manifest\.json"):
        manifest.loads(json.dumps(held).encode(), HERE)


@pytest.mark.parametrize(
    "name", sorted({*json.loads(PLAIN.dumps())} - {"digest", *manifest.OPTIONAL})
)
def test_a_manifest_that_lacks_a_field_is_refused(name: str) -> None:
    held = undigested()
    del held[name]
    with pytest.raises(CheckpointError):
        manifest.loads(json.dumps(held).encode(), HERE)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        manifest.loads(data, HERE)


@pytest.mark.parametrize("cut", [0, 1, 50, 400, -2])
def test_a_manifest_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        manifest.loads(PLAIN.dumps()[:cut], HERE)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":1,"a":2}', b'{"format":NaN}'])
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        manifest.loads(data, HERE)


def test_a_folder_without_one_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json$") as error:
        manifest.read(tmp_path)
    assert error.value.kind == "incomplete"


def test_the_kind_of_a_digest_follows_from_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(9.0)}, tmp_path / "a.pt")
    torch.save([1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "m.safetensors").write_bytes(b"0123")
    (tmp_path / "c.json").write_bytes(b"{}")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", b"y" * 1000)
    kinds = {name: file.kind for name, file in listed(tmp_path).items()}
    assert kinds == {
        "a.pt": "zip",
        "old.pt": "sha256",
        "m.safetensors": "crc32",
        "c.json": "sha256",
        "packed.zip": "sha256",
    }
    found = manifest.digest(tmp_path / "m.safetensors")
    assert found == FileRecord(4, f"crc32:{crc32(b'0123'):08x}")


def test_a_zip_without_crc32s_is_read_in_full(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.ones(9)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        missing = any(info.file_size and not info.CRC for info in archive.infolist())
    kind = manifest.digest(tmp_path / "a.pt").kind
    assert kind == ("sha256" if missing else "zip")


def test_a_whole_checkpoint_passes_and_progress_counts_every_byte(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2)
    held = manifest.read(checkpoint.folder)
    read: list[int] = []
    assert manifest.check(checkpoint.folder, held, True, read.append) == []
    assert sum(read) == held.nbytes


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("name", sorted(listed(SOURCE)))
def test_a_flipped_byte_is_found_wherever_it_matters(
    name: str, place: float, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(SOURCE / name, folder / name)
    held = replace(PLAIN, files={name: manifest.digest(folder / name)})
    data = bytearray((folder / name).read_bytes())
    at = int(place * len(data))
    payload = _payload(folder / name)
    data[at] ^= 0x40
    (folder / name).write_bytes(data)
    assert manifest.check(folder, held) == []
    found = manifest.check(folder, held, data=True)
    if payload is None or any(first <= at < last for first, last in payload):
        assert found and found[0].startswith(f"{name}: "), at


def _payload(path: Path) -> list[tuple[int, int]] | None:
    """The bytes of a zip that mean something: records and directory. ``None``: all of the file."""
    if not zipfile.is_zipfile(path):
        return None
    runs = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            start = info.header_offset + 30 + skip
            runs.append((start, start + info.file_size))
        runs.append((archive.start_dir, path.stat().st_size))
    return runs


def test_missing_short_long_and_replaced_files_are_told_apart(tmp_path: Path) -> None:
    folder = real(tmp_path, 2).folder
    held = manifest.read(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"short")
    with open(folder / "scheduler.pt", "ab") as file:
        file.write(b"more")
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    assert manifest.check(folder, held) == [
        "config.json: missing",
        "latest: no plain file",
        "scheduler.pt: 1465 bytes expected, found 1469",
        "tokenizer.json: 2457 bytes expected, found 5",
    ]


def test_a_zip_swapped_for_another_of_the_same_size_is_found(tmp_path: Path) -> None:
    tag = FIXTURES / "zero2-bf16-w2/global_step2"
    name = "mp_rank_00_model_states.pt"
    shutil.copytree(tag, tmp_path / "t")
    held = replace(PLAIN, files={f"t/{name}": manifest.digest(tmp_path / "t" / name)})
    data = bytearray((tmp_path / "t" / name).read_bytes())
    data[-30] ^= 1  # in the directory: what a file of the same form and other tensors would change
    (tmp_path / "t" / name).write_bytes(data)
    assert "zip" in manifest.check(tmp_path, held, data=True)[0]


def test_half_a_character_comes_back_as_it_was() -> None:
    document = undigested() | {"progress": {"\ud800": "\udc80"}}
    found = manifest.loads(json.dumps(document).encode(), HERE)
    assert found.progress == {"\ud800": "\udc80"}
    assert manifest.loads(found.dumps(), HERE).dumps() == found.dumps()
