"""A small path of every kind that ``converters.detect`` knows, and what its user is told to do."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stock_checkpoints
import torch
from paths import FIXTURES
from safetensors.numpy import save_file

from ckpt.rewrite import universal as converting

NAME = "zero2-bf16-w2"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 153733\n"
DCP = ("__0_0.distcp",)
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


@case("archive", "unpack it first (tar xf ")
def archive(folder: Path) -> Path:
    with tarfile.open(folder / "checkpoint-5", "w") as file:
        file.add(__file__, "x")
    return folder / "checkpoint-5"


@case("pointer-file", "; name the folder: ")
def pointer_file(folder: Path) -> Path:
    return tagged(folder, "mp_rank_00_model_states.pt") / "latest"


@case("model-file", "; name its folder: ")
def model_file(folder: Path) -> Path:
    return tensors(touch(folder, "config.json") / "model.safetensors") / "config.json"


@case("gguf", "llama.cpp runs it")
def gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    return folder / "model.gguf"


@case("no-tag", "has no tag global_step9; it holds the tag global_step5: choose it with ")
def no_tag(folder: Path) -> Path:
    return tagged(folder, "mp_rank_00_model_states.pt")


@case("deepspeed-universal", "")
def universal(folder: Path) -> Path:
    converting.execute(converting.plan_to(FIXTURES / NAME, output=folder / "u"))
    return folder / "u"


@case("deepspeed-experts", "")
def experts(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "pipelines-and-experts/moe-zero1-frozen", folder, dirs_exist_ok=True)
    return folder


@case("deepspeed-pipeline", "")
def pipeline(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "pipelines-and-experts/pipeline-zero1", folder, dirs_exist_ok=True)
    return folder


@case("deepspeed-model-parallel", "")
def tensor_parallel(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "parallel/tp_qwen3_frozen_z2_w4", folder, dirs_exist_ok=True)
    return folder


@case("deepspeed", "")
def deepspeed(folder: Path) -> Path:
    shutil.copytree(FIXTURES / NAME, folder, dirs_exist_ok=True)
    return folder


@case("deepspeed-several", "or take the newest with --last")
def several(folder: Path) -> Path:
    tagged(folder / "checkpoint-5", "mp_rank_00_model_states.pt")
    return folder


@case("deepspeed-file", "; the checkpoint is its folder: ")
def state_file(folder: Path) -> Path:
    torch.save({"module": {"a": torch.ones(3)}}, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt"


@case("megatron-dist", "ckpt show, to-fp32 and ckpt.open read it, and Megatron Bridge exports")
def megatron_dist(folder: Path) -> Path:
    (dcp(folder) / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 5}, folder / "common.pt")
    return folder


@case("megatron", "Megatron-LM's tools/checkpoint/convert.py converts it")
def megatron(folder: Path) -> Path:
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return touch(folder, "iter_0000100/mp_rank_00/model_optim_rng.pt")


_READS = "ckpt show, to-fp32 and ckpt.open read it"


@case("lightning-fsdp", _READS)
def lightning_fsdp(folder: Path) -> Path:
    torch.save({"pytorch-lightning_version": "2.6.6", "global_step": 5}, folder / "meta.pt")
    return dcp(folder)


@case("fsdp", _READS)
def fsdp(folder: Path) -> Path:
    dcp(folder / "pytorch_model_fsdp_0")
    dcp(folder / "optimizer_0")
    return touch(folder, "trainer_state.json")


@case("dcp-of-ranks", _READS)
def dcp_of_ranks(folder: Path) -> Path:
    import dcp_checkpoints

    return dcp_checkpoints.save_without_collectives(folder, lambda rank: {"a": torch.ones(3)})


@case("dcp", _READS)
def dcp(folder: Path) -> Path:
    stock_checkpoints.dcp(folder)
    return folder


@case("dcp-parts", _READS)
def dcp_parts(folder: Path) -> Path:
    dcp(folder / "model")
    dcp(folder / "optim")
    return folder


@case("dcp-safetensors", _READS)
def dcp_safetensors(folder: Path) -> Path:
    return tensors(folder / "shard-00001-model-00001-of-00001.safetensors")


@case("fsdp-of-ranks", _READS)
def fsdp_of_ranks(folder: Path) -> Path:
    for rank in range(2):
        torch.save({"a": torch.ones(3)}, folder / f"pytorch_model_fsdp_0_rank{rank}.bin")
    return folder


@case("fsdp-full", _READS)
def fsdp_full(folder: Path) -> Path:
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model_fsdp.bin")
    return folder


@case("dcp-file", "the checkpoint is its folder: ")
def dcp_file(folder: Path) -> Path:
    return dcp(folder) / DCP[0]


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


@case("trainer", "trainer.train(resume_from_checkpoint=...) goes on from it")
def trainer(folder: Path) -> Path:
    tensors(folder / "model.safetensors")
    return touch(folder, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@case("trainer-record", "; the checkpoint is its folder: ")
def trainer_record(folder: Path) -> Path:
    return touch(folder, "trainer_state.json") / "trainer_state.json"


@case("trainer-states", "copy these to there")
def trainer_states(folder: Path) -> Path:
    return touch(folder, "scheduler.pt", "rng_state_0.pth", "training_args.bin")


@case("trainer-file", "the checkpoint is its folder: ")
def trainer_file(folder: Path) -> Path:
    torch.save({"state": {}}, folder / "optimizer.pt")
    return folder / "optimizer.pt"


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


@case("safetensors-file", "ckpt.open and safetensors.safe_open read it as it is")
def safetensors_file(folder: Path) -> Path:
    return tensors(folder / "one.safetensors") / "one.safetensors"


@case("torch-file", "ckpt.open reads the tensors in it as they are")
def torch_file(folder: Path) -> Path:
    torch.save({"a": torch.ones(3)}, folder / "one.pt")
    return folder / "one.pt"


@case("parent", ": name ")
def parent(folder: Path) -> Path:
    dcp(folder / "step-5")
    return folder


@case("other-file", "expected the folder of a checkpoint")
def other_file(folder: Path) -> Path:
    (folder / "notes").write_text("of a run")
    return folder / "notes"


@case(
    "archives",
    "in it is an archive: unpack it first (tar xf ",
)
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


def foreign(folder: Path, name: str, data: bytes = b"x") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@case("hdf5", "from_pretrained(..., from_tf=True) of transformers 4 loads it")
def hdf5(folder: Path) -> Path:
    return foreign(folder, "weights", b"\x89HDF\r\n\x1a\n\0\0")


@case("flax", "from_pretrained(..., from_flax=True) of transformers 4 loads it")
def flax(folder: Path) -> Path:
    return foreign(folder, "flax_model.msgpack", b"\x81\xa6params\x80")


@case("onnx", "onnx.load reads it")
def onnx(folder: Path) -> Path:
    return foreign(folder, "model.onnx", b"\x08\x08")


@case("numpy", "numpy.load reads it")
def numpy_file(folder: Path) -> Path:
    np.savez(folder / "weights.npz", a=np.ones(3))
    return folder / "weights.npz"


@case("torch-program", "torch.export.load reads it")
def torch_program(folder: Path) -> Path:
    return foreign(folder, "model.pt2", b"PK\3\4")


@case("tensorflow", "TensorFlow reads it")
def tensorflow(folder: Path) -> Path:
    return foreign(folder, "saved_model.pb", b"\x08\x01")


@case("pickle", "pickle.load runs what it says")
def pickle_file(folder: Path) -> Path:
    return foreign(folder, "weights.pkl", b"\x80\x04}.")


@case("shards-alone", "without their index, model.safetensors.index.json")
def shards_alone(folder: Path) -> Path:
    return tensors(folder / "model-00001-of-00002.safetensors")


@case("other-names", "name the file, and ckpt show and ckpt.open read it")
def other_names(folder: Path) -> Path:
    return tensors(folder / "model.fp16.safetensors")


@case("foreign-folder", "tf_model.h5, which is a file of TensorFlow or Keras (HDF5)")
def foreign_folder(folder: Path) -> Path:
    return foreign(folder, "tf_model.h5").parent
