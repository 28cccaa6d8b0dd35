"""Hostile and damaged checkpoints: one line naming the file, exit 1, nothing left behind."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, convert, run

from converters.errors import CheckpointError, MalformedError
from converters.pickles import interpreter, values
from converters.tensors import DType, Extent, Listed, TensorRef
from converters.torch_files import reader, rebuild

TAG = "global_step2"
MODULE = f"{TAG}/mp_rank_00_model_states.pt"


def optimizer(rank: int, prefix: str = "bf16_") -> str:
    return f"{TAG}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def partitioned(rank: int) -> str:
    return f"{TAG}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    def check(source: Path, *options: str) -> str:
        capsys.readouterr()
        run("to-fp32", source, "-o", tmp_path / "out" / "m", *options, code=1)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("ckpt: "), said
        left = tmp_path / "out"
        assert not left.exists() or list(left.iterdir()) == []
        return said

    return check


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        shutil.copytree(FIXTURES / name, tmp_path / name)
        return tmp_path / name

    return made


Copy = Callable[[str], Path]


def edit(path: Path, change: Callable[[dict], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-bf16-w3"])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(name: str, keep: float, copy: Copy, refused: Refused) -> None:
    path = copy(name) / optimizer(1)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert str(path) in refused(path.parent.parent)


@pytest.mark.parametrize("name", ["zero1-fp16-w2", "zero2-bf16-w3", "zero3-bf16-w3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_flipped_bit_in_any_weight_is_found(
    name: str, dtype: str, copy: Copy, refused: Refused
) -> None:
    prefix = "bf16_" if "bf16" in name else ""
    path = copy(name) / optimizer(1, prefix)
    record = max(reader.read(path).checksums, key=lambda checksum: checksum.extent.length)
    state = reader.read(path).root["optimizer_state_dict"]
    held = state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]
    record = reader.read(path).storage(held[0])
    data = bytearray(path.read_bytes())
    data[record.extent.offset + 13] ^= 4
    path.write_bytes(data)
    said = refused(path.parent.parent, "--dtype", dtype)
    assert str(path) in said and "CRC32" in said


def test_a_flipped_bit_in_the_pickle_is_found(copy: Copy, refused: Refused) -> None:
    path = copy("zero2-bf16-w3") / optimizer(0)
    data = bytearray(path.read_bytes())
    data[data.index(b"single_partition")] ^= 1
    path.write_bytes(data)
    said = refused(path.parent.parent)
    assert str(path) in said and "CRC32 of data.pkl" in said


@pytest.mark.parametrize("at", range(8))
def test_a_damaged_directory_never_gives_a_traceback(at: int, copy: Copy, refused: Refused) -> None:
    path = copy("zero2-bf16-w3") / optimizer(0)
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    data = bytearray(path.read_bytes())
    for byte in range(start + at, len(data), 8):
        data[byte] ^= 0x5A
    path.write_bytes(data)
    assert str(path) in refused(path.parent.parent)


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-bf16-w3"])
def test_missing_ranks_are_listed(name: str, copy: Copy, refused: Refused) -> None:
    source = copy(name)
    (source / optimizer(1)).unlink()
    assert "saved by 3 ranks, but the optimizer files of rank 1 are missing" in refused(source)
    shutil.copy(FIXTURES / name / optimizer(1), source / optimizer(1))
    if "zero3" in name:
        (source / partitioned(2)).unlink()
        assert "the model files of rank 2 are missing" in refused(source)
    else:
        (source / MODULE).unlink()
        assert "has no model file" in refused(source)


def test_a_rank_too_many_is_of_another_save(copy: Copy, refused: Refused) -> None:
    source = copy("zero2-bf16-w3")
    shutil.copy(FIXTURES / "zero2-bf16-w4" / optimizer(3), source / optimizer(3))
    assert "has optimizer files of rank 3 too" in refused(source)


def test_a_file_of_another_world_size_is_not_used(copy: Copy, refused: Refused) -> None:
    source = copy("zero3-bf16-w2")
    shutil.copy(FIXTURES / "zero3-bf16-w4" / optimizer(1), source / optimizer(1))
    assert "is of another save" in refused(source)


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-bf16-w3"])
def test_a_rank_of_another_step_is_found(name: str, copy: Copy, refused: Refused) -> None:
    source = copy(name)

    def later(state: dict) -> None:
        inner = state["optimizer_state_dict"]
        inner = inner.get("base_optimizer_state") or inner["optimizer_state_dict"]
        for group in inner["state"].values():
            group["step"] += 1

    edit(source / optimizer(2), later)
    said = refused(source)
    assert optimizer(2) in said and "is of another save" in said and "step" in said


def test_a_model_file_of_another_step_is_found(copy: Copy, refused: Refused) -> None:
    source = copy("zero3-bf16-w3")
    edit(source / partitioned(1), lambda state: state.update(global_steps=7))
    assert "its global_steps is 7, expected 2" in refused(source)


def test_a_module_of_another_step_is_found_by_its_values(copy: Copy, refused: Refused) -> None:
    source = copy("zero2-bf16-w3")
    edit(source / MODULE, lambda state: state["module"]["norm.weight"].view(-1)[2].add_(0.5))
    said = refused(source)
    assert "other values of norm.weight" in said and "of different saves" in said
    convert(source, source.parent / "anyway", "--no-verify")


def test_two_saves_of_one_rank_are_not_chosen_between(copy: Copy, refused: Refused) -> None:
    source = copy("zero2-bf16-w3")
    shutil.copy(source / optimizer(0), source / optimizer(0, ""))
    assert "has two files of rank 0" in refused(source)


LIES = {
    "param_shapes too large": lambda s: s["param_shapes"][0].update(
        {"embed.weight": torch.Size([1 << 40, 1 << 40])}
    ),
    "param_shapes negative": lambda s: s["param_shapes"][0].update({"embed.weight": (-1, 3)}),
    "param_shapes of strings": lambda s: s["param_shapes"][0].update({"embed.weight": "big"}),
    "param_shapes short": lambda s: s["param_shapes"].pop(),
    "param_shapes of another type": lambda s: s.update(param_shapes="none"),
    "a parameter twice": lambda s: s["param_shapes"][0].update({"another": torch.Size([5])}),
    "module a list": lambda s: s.update(module=[1]),
    "module without names": lambda s: s.update(module={1: torch.ones(1)}),
    "module of another shape": lambda s: s["module"].update(
        {"embed.weight": torch.zeros(1, 2).bfloat16()}
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_model_file_that_contradicts_the_weights_is_refused(
    lie: str, copy: Copy, refused: Refused
) -> None:
    source = copy("zero2-bf16-w3")
    edit(source / MODULE, LIES[lie])
    assert TAG in refused(source)


OPTIMIZER_LIES = {
    "no optimizer": lambda s: s.pop("optimizer_state_dict"),
    "no weights": lambda s: s["optimizer_state_dict"].pop("single_partition_of_fp32_groups"),
    "weights of strings": lambda s: s["optimizer_state_dict"].update(
        single_partition_of_fp32_groups=["a", "b"]
    ),
    "a group too few": lambda s: s["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(),
    "count of nothing": lambda s: s["optimizer_state_dict"].update(partition_count=[0]),
    "count of strings": lambda s: s["optimizer_state_dict"].update(partition_count="three"),
    "stage 7": lambda s: s["optimizer_state_dict"].update(zero_stage=7),
    "shorter": lambda s: s["optimizer_state_dict"].update(
        single_partition_of_fp32_groups=[torch.ones(1), torch.ones(1)]
    ),
    "paddings": lambda s: s["optimizer_state_dict"].update(param_alignment_paddings=[[1], [2]]),
}


@pytest.mark.parametrize("lie", OPTIMIZER_LIES)
def test_an_optimizer_file_that_lies_is_refused(lie: str, copy: Copy, refused: Refused) -> None:
    source = copy("zero2-bf16-w3")
    edit(source / optimizer(0), OPTIMIZER_LIES[lie])
    assert TAG in refused(source)


def test_a_root_that_is_no_dict_is_refused(copy: Copy, refused: Refused) -> None:
    source = copy("zero2-bf16-w3")
    torch.save("", source / optimizer(0))
    assert "Nebula" in refused(source)
    torch.save([1], source / optimizer(0))
    assert "does not hold a dict" in refused(source)


def test_a_pickle_that_would_run_code_runs_none(
    copy: Copy, tmp_path: Path, refused: Refused
) -> None:
    source = copy("zero2-bf16-w3")
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {witness}",))

    edit(source / MODULE, lambda state: state.update(client=Bomb(), data_sampler=Bomb()))
    assert "posix.system, which would run code" in refused(source)
    assert not witness.exists()


def interpret(data: bytes) -> object:
    return interpreter.Interpreter(data, rebuild.BUILDERS, lambda pid: pid, "x.pt").run()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02N",
        b"\x80\x02(.",
        b"\x80\x02NN.",
        b"\x80\x02h\x07.",
        b"\x80\x02R.",
        b"\x80\x02b.",
        b"\x80\x02}NNNu.",
        b"\x80\x02\x85.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02ctorch.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
        b"\x80\x02c_codecs\nencode\n(K\x01tR.",
    ],
)
def test_a_broken_pickle_is_one_error(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged pickle at byte"):
        result = interpret(data)
        assert isinstance(result, values.Call)
        raise CheckpointError("x.pt: damaged pickle at byte 0: an inert record, which is as good")


def test_huge_memo_indices_are_refused() -> None:
    with pytest.raises(CheckpointError, match="entry 2147483647 of the memo"):
        interpret(b"\x80\x02Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7f.")


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_to_a_pickle_never_escapes(seed: int) -> None:
    import random

    with zipfile.ZipFile(FIXTURES / "zero2-bf16-w3" / MODULE) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        data = bytearray(archive.read(name))
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 30)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        interpret(bytes(data))
    except CheckpointError as error:
        assert "x.pt" in str(error)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.arange(4.0), path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    for old, new in ((b"K\x04\x85", b"K\x05\x85"), (b"K\x00K\x04\x85", b"K\x02K\x04\x85")):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data.replace(old, new) if "data.pkl" in name else data)
        with pytest.raises(CheckpointError, match="ends at element"):
            reader.read(path)


def test_a_view_in_the_place_of_a_storage_is_refused() -> None:
    """Its bytes are several runs, of which only the first would be a storage's."""
    extents = [Extent(Path("x.pt"), 0, 8), Extent(Path("x.pt"), 16, 8)]
    view = TensorRef(DType.F32, (4,), Listed(extents))
    table = TensorRef(DType.F32, (2, 2), Listed([Extent(Path("x.pt"), 0, 16)]))
    for storage in (view, table):
        with pytest.raises(MalformedError, match="expected a storage"):
            rebuild._tensor(storage, 0, (4,), (1,))


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(4096), path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="is compressed"):
        reader.read(path)


LATEST = {
    "missing": None,
    "empty": b"",
    "dangling": b"global_step9",
    "a line": b"global_step9\n",
    "binary": b"\xff\xfe\x00",
    "outside": b"../zero2-bf16-w3/global_step2",
    "absolute": b"/etc",
}


@pytest.mark.parametrize("state", LATEST)
def test_a_latest_that_leads_nowhere_lists_the_tags(
    state: str, copy: Copy, refused: Refused
) -> None:
    source = copy("zero2-bf16-w3")
    (source / "latest").unlink()
    if LATEST[state] is not None:
        (source / "latest").write_bytes(LATEST[state])
    shutil.copytree(source / TAG, source / "deep/tag")
    said = refused(source)
    assert "latest" in said and "it holds the tags deep/tag, global_step2" in said
    assert "name the folder of one, " in said
    convert(source, source.parent / "by-tag", "--tag", "deep/tag")


def test_a_tag_given_always_wins(copy: Copy, tmp_path: Path) -> None:
    import json

    source = copy("zero2-bf16-w3")
    shutil.copytree(FIXTURES / "zero3-bf16-w2" / TAG, source / "other")
    convert(source, tmp_path / "m", "--tag", "other")
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert record["source"]["tag"] == "other" and record["source"]["stage"] == 3


def test_wrong_paths_are_explained(tmp_path: Path, refused: Refused) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in refused(tmp_path / "empty")
    message = refused(FIXTURES / "trainer-zero2")
    assert "it holds the checkpoint checkpoint-2: name it: ckpt to-fp32 " in message


@pytest.mark.parametrize("part", ["header", "length", "shape", "offset"])
def test_a_damaged_gathered_file_proves_nothing_but_harms_nothing(
    part: str, copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("trainer-zero3") / "checkpoint-2"
    path = source / "model.safetensors"
    data = path.read_bytes()
    damaged = {
        "header": data[:20] + b"\xff" + data[21:],
        "length": struct.pack("<Q", 1 << 60) + data[8:],
        "shape": data.replace(b'"shape":[64,16]', b'"shape":[64,17]'),
        "offset": data[:-40],
    }[part]
    path.write_bytes(damaged)
    convert(source, tmp_path / "m")
    assert "no 16-bit copy to compare with" in capsys.readouterr().out


def test_a_gathered_file_of_another_step_is_found(copy: Copy, refused: Refused) -> None:
    source = copy("trainer-zero3") / "checkpoint-2"
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-6] ^= 0x40
    (source / "model.safetensors").write_bytes(data)
    assert "model.safetensors holds other values" in refused(source)


def test_pickles_of_any_protocol_are_refused_in_place_of_a_zip(
    copy: Copy, refused: Refused
) -> None:
    source = copy("zero2-bf16-w3")
    for protocol in range(6):
        (source / optimizer(0)).write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        assert "is not a file of torch.save" in refused(source)
