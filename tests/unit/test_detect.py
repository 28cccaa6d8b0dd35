"""What lies at a path, from names and first bytes alone, and what a user is told of it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import FIXTURES, ROOT, run
from safetensors.numpy import save_file

import ckpt
from converters.detect import detect
from converters.detect.detection import reader
from converters.detect.kinds import BY_NAME, KINDS
from converters.errors import CheckpointError
from converters.source import Source
from converters.zero import checkpoint as zero

NAME = "zero2-bf16-w2"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 153733\n"
DCP = ("__0_0.distcp", "__1_0.distcp")
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {}
Case = Callable[[Path], Path]


def case(name: str, remedy: str) -> Callable[[Case], Case]:
    """Registers what makes a path of a kind, and words of what its user is told."""

    def register(build: Case) -> Case:
        CASES[name] = (build, remedy)
        return build

    return register


def touch(folder: Path, *names: str) -> Path:
    """The folder with empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def tensors(path: Path) -> Path:
    """A safetensors file with one tensor, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.ones(3, "f4")}, path)
    return path.parent


def tagged(folder: Path, *names: str) -> Path:
    """A save_dir with a tag of these files."""
    touch(folder / "global_step5", *names)
    (folder / "latest").write_text("global_step5")
    return folder


@case("nothing", "does not exist; expected the folder of a checkpoint")
def nothing(folder: Path) -> Path:
    return folder / "nowhere"


@case("git-lfs-pointer", "run git lfs pull in its repository")
def pointer(folder: Path) -> Path:
    (folder / "model.bin").write_bytes(POINTER)
    return folder / "model.bin"


@case("web-page", "download the file's own address")
def web_page(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>Log in</html>")
    return folder / "model.safetensors"


@case("archive", "unpack it first")
def archive(folder: Path) -> Path:
    with tarfile.open(folder / "checkpoint-5", "w") as file:
        file.add(__file__, "x")
    return folder / "checkpoint-5"


@case("gguf", "llama.cpp runs it")
def gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    return folder / "model.gguf"


@case("no-tag", "has no tag global_step9; it holds the tags global_step5: choose one with --tag")
def no_tag(folder: Path) -> Path:
    return tagged(folder, "mp_rank_00_model_states.pt")


@case("deepspeed-universal", "make native files of it first with ckpt from-universal")
def universal(folder: Path) -> Path:
    return tagged(folder, "zero/optimizer_state.pt", "mp_rank_00_model_states.pt")


@case("deepspeed-experts", "load it with DeepSpeed in the training that wrote it")
def experts(folder: Path) -> Path:
    name = "layer_0_expert_1_mp_rank_00_model_states.pt"
    return tagged(folder, name, "mp_rank_00_model_states.pt")


@case("deepspeed-pipeline", "load it with DeepSpeed in the training that wrote it")
def pipeline(folder: Path) -> Path:
    names = ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")
    return tagged(folder, "layer_00-model_00-model_states.pt", *names)


@case("deepspeed-model-parallel", "load it with DeepSpeed in the training that wrote it")
def tensor_parallel(folder: Path) -> Path:
    return tagged(folder, *(f"mp_rank_{rank:02d}_model_states.pt" for rank in range(2)))


@case("deepspeed", "")
def deepspeed(folder: Path) -> Path:
    shutil.copytree(FIXTURES / NAME, folder, dirs_exist_ok=True)
    return folder


@case("deepspeed-several", "it holds the checkpoints checkpoint-5: name one of these folders")
def several(folder: Path) -> Path:
    tagged(folder / "checkpoint-5", "mp_rank_00_model_states.pt")
    return folder


@case("deepspeed-file", "expected the folder of a checkpoint: ")
def state_file(folder: Path) -> Path:
    return touch(folder, "mp_rank_00_model_states.pt") / "mp_rank_00_model_states.pt"


@case("megatron-dist", "Megatron Bridge exports it to a model folder")
def megatron_dist(folder: Path) -> Path:
    return touch(folder, "common.pt", "metadata.json", ".metadata", *DCP)


@case("megatron", "Megatron-LM's tools/checkpoint/convert.py converts it")
def megatron(folder: Path) -> Path:
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return touch(folder, "iter_0000100/mp_rank_00/model_optim_rng.pt")


@case("lightning-fsdp", "lightning.pytorch.utilities.consolidate_checkpoint makes one file of it")
def lightning_fsdp(folder: Path) -> Path:
    return touch(folder, "meta.pt", ".metadata", *DCP)


@case("fsdp", "accelerate merge-weights makes a model folder of pytorch_model_fsdp_0")
def fsdp(folder: Path) -> Path:
    inner = [f"{part}/{name}" for part in ("pytorch_model_fsdp_0", "optimizer_0") for name in DCP]
    return touch(folder, "pytorch_model_fsdp_0/.metadata", "trainer_state.json", *inner)


@case("dcp-of-ranks", "load it with torch.distributed.checkpoint.load on as many ranks")
def dcp_of_ranks(folder: Path) -> Path:
    return touch(folder, "__0.metadata", "__1.metadata", *DCP)


@case("dcp", "dcp_to_torch makes one file of it")
def dcp(folder: Path) -> Path:
    return touch(folder, ".metadata", *DCP)


@case("dcp-safetensors", "load it with torch's HuggingFaceStorageReader")
def dcp_safetensors(folder: Path) -> Path:
    return tensors(folder / "shard-00001-model-00001-of-00001.safetensors")


@case("fsdp-of-ranks", "accelerator.load_state reads it on as many ranks")
def fsdp_of_ranks(folder: Path) -> Path:
    return touch(folder, *(f"pytorch_model_fsdp_0_rank{rank}.bin" for rank in range(2)))


@case("fsdp-full", "pytorch_model_fsdp.bin in it holds the weights already")
def fsdp_full(folder: Path) -> Path:
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model_fsdp.bin")
    return folder


@case("dcp-file", "the checkpoint is its folder: ")
def dcp_file(folder: Path) -> Path:
    return touch(folder, ".metadata", *DCP) / DCP[0]


@case("hub-cache", "snapshots/abc")
def hub_cache(folder: Path) -> Path:
    return touch(folder, "snapshots/abc/config.json", "refs/main")


@case("misplaced-weights", "git lfs pull")
def misplaced_weights(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(POINTER)
    return touch(folder, "config.json")


def weights_alone(folder: Path) -> Path:
    tensors(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "tier": "weights"}))
    return folder


@case("weights-tier", "a training cannot go on from")
def weights_tier(folder: Path) -> Path:
    return weights_alone(folder / "weights-5")


@case("slimmed", "whose states are gone")
def slimmed(folder: Path) -> Path:
    return weights_alone(folder / "checkpoint-5")


@case("adapter", "PeftModel.from_pretrained reads it")
def adapter(folder: Path) -> Path:
    return touch(tensors(folder / "adapter_model.safetensors"), "adapter_config.json")


@case("gathered-16bit", "so there is nothing to convert")
def gathered(folder: Path) -> Path:
    return touch(tensors(folder / "model.safetensors"), "trainer_state.json")


@case("accelerate", "accelerator.load_state goes on from it")
def accelerate(folder: Path) -> Path:
    return touch(tensors(folder / "model.safetensors"), "random_states_0.pkl", "optimizer.bin")


@case("safetensors", "has the weights already, model.safetensors, so there is nothing to convert")
def safetensors(folder: Path) -> Path:
    return tensors(folder / "model.safetensors")


@case("lightning-file", "load_from_checkpoint reads it")
def lightning_file(folder: Path) -> Path:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, folder / "last.ckpt")
    return folder / "last.ckpt"


@case("torch-bin", "has the weights already, pytorch_model.bin, so there is nothing to convert")
def torch_bin(folder: Path) -> Path:
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model.bin")
    return folder


@case("parent", "dcp_to_torch makes one file of it")
def parent(folder: Path) -> Path:
    dcp(folder / "step-5")
    return folder


@case("other-file", "expected the folder of a checkpoint")
def other_file(folder: Path) -> Path:
    (folder / "notes").write_text("of a run")
    return folder / "notes"


@case("archives", "checkpoint-5.tar.gz in it is an archive: unpack it first")
def archives(folder: Path) -> Path:
    return touch(folder, "checkpoint-5.tar.gz", "README.md")


@case("unfinished-download", "download it again")
def unfinished(folder: Path) -> Path:
    return touch(folder, "model.safetensors.incomplete")


@case("empty", "save or copy one to there")
def empty(folder: Path) -> Path:
    return folder


@case("unknown", "it holds README.md, train.py: name the folder of a checkpoint")
def unknown(folder: Path) -> Path:
    return touch(folder, "train.py", "README.md")


def test_every_kind_has_a_case_here() -> None:
    assert CASES.keys() == BY_NAME.keys()
    assert len(BY_NAME) == len(KINDS)


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_recognised_and_its_user_is_told_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, remedy = CASES[name]
    path = build(tmp_path)
    options = ["--tag", "global_step9"] if name == "no-tag" else []
    detection = detect(path, options[1] if options else None)
    assert detection.kind is BY_NAME[name]
    if name == "deepspeed":
        run("to-fp32", path, "--dry-run")
        text = capsys.readouterr().out
        assert "\nkind         DeepSpeed checkpoint, ZeRO stage 2, 2 ranks\n" in text
        return

    lines = []
    for command in (["to-fp32", path, "-o", tmp_path / "out"], ["show", path]):
        run(*command, *options, code=1)
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] == f"ckpt: {detection.refusal}\n"
    assert remedy in lines[0] and not (tmp_path / "out").exists()

    run("show", path, *options, "--json", code=1)
    assert json.loads(capsys.readouterr().err)["kind"] == detection.kind.trouble


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.refusal])
def test_a_command_that_means_deepspeed_says_the_same(name: str, tmp_path: Path) -> None:
    path = CASES[name][0](tmp_path)
    tag = "global_step9" if name == "no-tag" else None
    with pytest.raises(CheckpointError) as error:
        zero.read(path, tag)
    assert str(error.value) == detect(path, tag).refusal


@pytest.mark.parametrize("name", sorted({kind.reader for kind in KINDS if kind.reader}))
def test_a_reader_of_the_table_is_one(name: str) -> None:
    function = reader(name)
    parameters = list(inspect.signature(function).parameters)
    assert parameters == ["path", "tag", "complete"]
    annotation = inspect.signature(function, eval_str=True).return_annotation
    assert issubclass(annotation, Source)


@pytest.mark.parametrize(
    "name", ["weights-tier", "slimmed", "adapter", "gathered-16bit", "accelerate", "safetensors"]
)
def test_what_needs_no_conversion_opens_as_it_is(name: str, tmp_path: Path) -> None:
    with ckpt.open(CASES[name][0](tmp_path), "np") as weights:
        assert list(weights) == ["a"] and (weights["a"] == 1).all()


@pytest.mark.parametrize("name", ["torch-bin", "fsdp-full"])
def test_files_of_torch_save_open_as_they_are(name: str, tmp_path: Path) -> None:
    path = CASES[name][0](tmp_path)
    path = path / "pytorch_model_fsdp.bin" if name == "fsdp-full" else path
    with ckpt.open(path, "np") as weights:
        assert list(weights) == ["a"] and (weights["a"] == 1).all()


@pytest.mark.parametrize(
    ("fixture", "detail"),
    [
        ("zero0-fp32", "no ZeRO (stage 0)"),
        ("zero1-bf16-w2", "ZeRO stage 1 or 2"),
        ("zero2-bf16-w2", "ZeRO stage 1 or 2"),
        ("zero3-bf16-w2", "ZeRO stage 3"),
    ],
)
def test_names_tell_the_stage_as_far_as_they_can(fixture: str, detail: str) -> None:
    assert detect(FIXTURES / fixture).detail == detail


def test_a_link_named_latest_to_a_folder_is_no_pointer_of_deepspeed(tmp_path: Path) -> None:
    dcp(tmp_path / "step-5")
    (tmp_path / "latest").symlink_to("step-5")
    assert detect(tmp_path).kind.name == "parent"


def test_weights_come_before_states_that_nothing_points_to_where_weights_are_opened(
    tmp_path: Path,
) -> None:
    shutil.copytree(next((FIXTURES / NAME).glob("global_step*")), tmp_path, dirs_exist_ok=True)
    tensors(tmp_path / "model.safetensors")
    assert detect(tmp_path).kind.name == "deepspeed"
    with ckpt.open(tmp_path, "np") as weights:
        assert list(weights) == ["a"]


def test_nothing_is_executed_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "c" / "global_step5"
    folder.mkdir(parents=True)
    torch.save(Evil(), folder / "mp_rank_00_model_states.pt")
    (tmp_path / "c/latest").write_text("global_step5")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from converters.detect import detect\n"
        f"print(detect(Path({str(tmp_path / 'c')!r})).kind.name)\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'converters.pickles'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "deepspeed\n[]\n"
    assert not (tmp_path / "ran").exists()


def test_the_kind_is_in_json_and_in_the_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("show", FIXTURES / NAME)
    assert capsys.readouterr().out.startswith("kind         DeepSpeed checkpoint\n")
    run("show", FIXTURES / NAME, "--json")
    assert json.loads(capsys.readouterr().out)["kind"] == "deepspeed"
    run("to-fp32", FIXTURES / NAME, "-o", tmp_path / "m", "--json")
    assert json.loads(capsys.readouterr().out)["source"]["kind"] == "deepspeed"


def test_a_source_says_what_it_is_in_one_line() -> None:
    source = zero.read(FIXTURES / NAME)
    assert re.fullmatch(r"<Checkpoint '.*global_step\d+': 20 tensors>", repr(source))


def test_the_docs_show_the_table() -> None:
    page = (ROOT / "docs/inputs.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| `[\w-]+` \|", line)]
    assert rows == [row(kind.name) for kind in KINDS]


def row(name: str) -> str:
    """A kind's row in the page."""
    kind = BY_NAME[name]
    answer = (
        "read by every command" if kind.refusal is None else kind.refusal.format(evidence="...")
    )
    return f"| `{kind.name}` | {kind.title} | {kind.recognized_by} | {answer} |"
