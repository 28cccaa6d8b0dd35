"""to-fp32 --merge: folders that load as the trained model, and give its logits."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
import zero_folders
from heavy_libraries import transformers
from oracles import ROOT
from safetensors.torch import load_file, save_file

from ckpt.hub.content.contents import contents
from ckpt.runs.run import open_checkpoint
from ckpt.weights.conversion import convert, task
from ckpt.weights.conversion.record import ConversionRecord
from ckpt.weights.request import Naming, Request
from converters.errors import CheckpointError
from converters.execute.virtual_file import Serving

MERGED_TYPES = ["LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "LN_TUNING", "TRAINABLE_TOKENS"]
PROMPTS = {"prompt-classes", "prompt", "prefix", "prefix-projection", "p-tuning"}
KINDS = [
    *("lora", "rslora", "dora", "dora-embedding", "embedding", "head", "tied-embedding"),
    *("pattern", "all-linear", "saved-modules", "tied-saved", "tokens", "tokens-and-embedding"),
    *("tied-tokens", "biases", "lora-biases", "bias-of-b", "classes", "gpt2", "gpt2-head"),
    *("adalora", "loha", "lokr", "ia3", "vera", "ln-tuning", "trained-tokens"),
]
UNMERGED = peft_models.KINDS.keys() - PROMPTS - {*KINDS}
IDS = torch.arange(12).reshape(2, 6) + 1


class Run:
    """A trained PEFT model, its checkpoint, and the base model's folder."""

    def __init__(
        self,
        kind: str,
        root: Path,
        stage: int = 2,
        exclude_frozen: bool = False,
        edit: Any = lambda model: None,
        **adapters: Any,
    ):
        self.model = peft_models.model(kind, **adapters)
        with torch.no_grad():
            for value in (*self.model.parameters(), *self.model.buffers()):
                if not value.requires_grad and value.is_floating_point():
                    value.copy_(value.bfloat16().float())
            for name, value in self.model.named_parameters():
                if ".ranknum." in name:
                    value.fill_(4.0)
        edit(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(self.model).unload()
        self.base = root / "base"
        self.save_base(base)
        peft_models.saved(self.model, root / "live")
        self.checkpoint = zero_folders.save(
            self.model, root / "checkpoint-2", stage, 2, exclude_frozen
        )
        for path in [*(root / "live").glob("**/adapter_config.json")]:
            target = self.checkpoint / path.relative_to(root / "live")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        self.output = root / "merged"

    def save_base(self, base: Any) -> None:
        base.save_pretrained(self.base)

    def merge(self, dtype: str = "fp32", **wishes: Any) -> ConversionRecord:
        made = self.prepare(dtype, **wishes)
        return convert.execute(made, overwrite=True)

    def prepare(self, dtype: str = "fp32", **wishes: Any) -> task.Conversion:
        request = Request(merge=True, **wishes)
        return convert.prepare(self.checkpoint, self.output, dtype=dtype, request=request)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model.safetensors")

    def loaded(self) -> Any:
        """The merged model as a reader opens it; every name must fit."""
        config = json.loads((self.output / "config.json").read_text())
        reader = getattr(transformers, config["architectures"][0])
        model, info = reader.from_pretrained(
            self.output, output_loading_info=True, dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return model.eval()

    def require_same_logits(self) -> None:
        with torch.no_grad():
            expected = self.model.eval()(input_ids=IDS).logits
            found = self.loaded()(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_names_above_are_those_of_what_peft_merges() -> None:
    configs = {kind: config() for kind, (_, config) in peft_models.KINDS.items()}
    prompts = {kind for kind, config in configs.items() if config.is_prompt_learning}
    merged = {kind for kind, config in configs.items() if config.peft_type in MERGED_TYPES}

    assert prompts == PROMPTS
    assert merged - {"vera-no-projection"} == {*KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "exclude_frozen"), [(2, False), (3, False), (2, True)])
def test_the_merged_model_gives_the_trained_models_logits(
    kind: str, stage: int, exclude_frozen: bool, tmp_path: Path
) -> None:
    run = Run(kind, tmp_path, stage, exclude_frozen)

    facts = run.merge(base=run.base) if exclude_frozen else run.merge(config=run.base)

    assert facts["kind"] == "merged"
    assert not facts["checks"]["unlike_tensors"]
    run.require_same_logits()


@pytest.mark.parametrize("kind", sorted(UNMERGED))
def test_what_is_not_merged_is_said(kind: str, tmp_path: Path) -> None:
    run = Run(kind, tmp_path)
    with pytest.raises(CheckpointError, match="merge it with PEFT") as error:
        run.merge()
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("kind", sorted(PROMPTS))
def test_a_prompt_cannot_be_merged(kind: str, tmp_path: Path) -> None:
    model = peft_models.model(kind)
    peft_models.saved(model, tmp_path / "live")
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    shutil.copy(tmp_path / "live/adapter_config.json", checkpoint)
    with pytest.raises(CheckpointError, match="nothing to merge; without merge=True"):
        convert.prepare(checkpoint, tmp_path / "out", request=Request(merge=True))


def test_the_base_is_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    entry = tmp_path / "hub/models--org--base"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs/main").write_text("abc123")
    (entry / "snapshots").mkdir()
    run.base.rename(entry / "snapshots/abc123")
    path = run.checkpoint / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}
    path.write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"org/base, is not on this machine.*base=DIR"):
        run.merge()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    facts = run.merge()

    assert any("(revision abc123)" in note for note in facts["notes"])
    run.require_same_logits()


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_the_base_may_lie_in_shards_or_bin_files(form: str, tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    if form == "sharded":
        model = transformers.AutoModelForCausalLM.from_pretrained(run.base)
        (run.base / "model.safetensors").unlink()
        model.save_pretrained(run.base, max_shard_size="10KB")
        assert (run.base / "model.safetensors.index.json").is_file()
    else:
        torch.save(load_file(run.base / "model.safetensors"), run.base / "pytorch_model.bin")
        (run.base / "model.safetensors").unlink()

    facts = run.merge(base=run.base)

    run.require_same_logits()
    names = {Path(file["name"]).name for file in facts["source"]["files"]}
    assert any(name.startswith(("model-", "pytorch_model")) for name in names)


def test_the_base_in_its_original_precision_wins(tmp_path: Path) -> None:
    def finer(model: Any) -> None:  # the base had more bits than its copy in the checkpoint
        with torch.no_grad():
            model.base_model.model.model.norm.weight.add_(1e-5)

    run = Run("lora", tmp_path, edit=finer)
    facts = run.merge(base=run.base)
    assert not facts["checks"]["unlike_tensors"]
    base = load_file(run.base / "model.safetensors")
    assert torch.equal(run.tensors()["model.norm.weight"], base["model.norm.weight"])
    facts = run.merge(config=run.base)
    assert any("base=DIR takes the base in its original" in note for note in facts["notes"])


def test_a_base_of_another_revision_is_said(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    tensors = load_file(run.base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"  # one that the adapter changes
    tensors[name][0, 0] += 1
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})

    facts = run.merge(base=run.base)

    assert facts["checks"]["unlike_tensors"] == [name]
    from ckpt.cli import conversion as reports

    assert "1 tensor of the base does not round" in reports.verified(facts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("shape", "model.norm.weight of shape 8, .*base_model.model.model.norm.weight of 16:"),
        ("name", "has no model.norm.weight, which the checkpoint has frozen as base_model"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(change: str, words: str, tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    tensors = load_file(run.base / "model.safetensors")
    value = tensors.pop("model.norm.weight")
    if change == "shape":
        tensors["model.norm.weight"] = value[:8].clone()
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        run.merge(base=run.base)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    with pytest.raises(CheckpointError, match="it is an adapter"):
        run.merge(base=run.checkpoint)


def test_names_of_the_base_that_the_model_has_not_are_left_out(tmp_path: Path) -> None:
    run = Run("classes", tmp_path)
    tensors = load_file(run.base / "model.safetensors")
    del tensors["score.weight"]
    tensors["lm_head.weight"] = torch.zeros(40, 16)
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})
    path = run.base / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    for key in ("id2label", "label2id", "num_labels"):
        config.pop(key, None)
    path.write_text(json.dumps(config))

    facts = run.merge(base=run.base)

    assert any("lm_head.weight: in the base" in note for note in facts["notes"])
    assert any("LlamaForSequenceClassification" in note for note in facts["notes"])
    run.require_same_logits()


def test_tied_embeddings_are_untied_where_one_is_changed(tmp_path: Path) -> None:
    run = Run("tied-embedding", tmp_path)
    facts = run.merge(config=run.base)
    config = json.loads((run.output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert any("was tied to model.embed_tokens.weight" in note for note in facts["notes"])
    run.require_same_logits()


def test_a_resized_vocabulary_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    run = Run("saved-modules", tmp_path)
    small = json.loads((run.base / "config.json").read_text()) | {"vocab_size": 30}
    (run.base / "config.json").write_text(json.dumps(small))
    tensors = load_file(run.base / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:30].clone()
    save_file(tensors, run.base / "model.safetensors", {"format": "pt"})
    facts = run.merge(base=run.base)
    assert any("vocab_size is 40" in note for note in facts["notes"])
    run.require_same_logits()


def test_trained_adapters_are_merged_in_order(tmp_path: Path) -> None:
    other = peft_models._lora(r=2, target_modules=["q_proj", "v_proj"])
    both = ["default", "other"]
    run = Run("lora", tmp_path, edit=lambda m: m.base_model.set_adapter(both), other=other)
    facts = run.merge(config=run.base)
    assert any("default, other in this order" in note for note in facts["notes"])
    run.require_same_logits()

    run.merge(config=run.base, naming=Naming(part="default"))
    run.model.set_adapter("default")
    run.require_same_logits()

    run.merge(config=run.base, naming=Naming(part="other,default"))
    assert run.merge()["rules"] == [
        "the adapter default (LoRA) merged in",
        "the adapter other (LoRA) merged in",
    ]
    with pytest.raises(CheckpointError, match="no such adapter; the adapters are default, other"):
        run.merge(naming=Naming(part="third"))


def test_an_adapter_that_was_not_trained_is_left_out(tmp_path: Path) -> None:
    other = peft_models._lora(r=2, target_modules=["q_proj", "v_proj"])
    run = Run("lora", tmp_path, reference=other)  # as a DPO run keeps one
    facts = run.merge(config=run.base)
    assert any("not reference, which was not trained" in note for note in facts["notes"])
    run.require_same_logits()


@pytest.mark.parametrize("dtype", ["bf16", "keep"])
def test_16_bit_models_have_one_type(dtype: str, tmp_path: Path) -> None:
    run = Run("saved-modules", tmp_path)
    run.merge(dtype, config=run.base)
    assert {value.dtype for value in run.tensors().values()} == {torch.bfloat16}
    assert json.loads((run.output / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_that_training_began_by_changing_is_not_replaced(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    path = run.checkpoint / "adapter_config.json"
    values = json.loads(path.read_text()) | {"init_lora_weights": "pissa_niter_4"}
    path.write_text(json.dumps(values))
    run.merge(config=run.base)
    with pytest.raises(CheckpointError, match="pissa_niter_4, which changed the base's weights"):
        run.merge(base=run.base)


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)
    (run.checkpoint / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config="):
        run.merge()
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    run.merge(adapter_config=small, config=run.base)
    run.require_same_logits()


def test_the_base_is_never_written_over(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    made = run.prepare(base=run.base)
    with pytest.raises(CheckpointError, match="name another folder"):
        convert.run(replace(made, output=run.base), overwrite=True)
    assert (run.base / "model.safetensors").is_file()


def test_a_merged_model_is_served_as_it_is_written(tmp_path: Path) -> None:
    run = Run("dora", tmp_path)
    run.merge(config=run.base)
    plan = run.prepare(config=run.base).plan
    serving = Serving(plan)
    with serving.open(plan.shards[0]) as file:
        assert file.read() == (run.output / "model.safetensors").read_bytes()
        file.check()
    assert serving.check().compared > 0


def test_a_push_sends_the_merged_model_with_a_card_of_its_own(tmp_path: Path) -> None:
    run = Run("lora", tmp_path, exclude_frozen=True)
    (run.checkpoint / "README.md").write_text("---\nlibrary_name: peft\n---\n")

    found = contents(
        open_checkpoint(run.checkpoint),
        max_shard_size=1 << 40,
        repo="org/merged",
        request=Request(merge=True, base=run.base),
    )

    sources = {item.name: item.source for item in found.items}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= sources.keys()
    assert not {name for name in sources if name.startswith("adapter")}
    card = sources["README.md"]
    assert isinstance(card, bytes)
    assert b"library_name: transformers" in card
    assert b"LoRA adapter merged into its base model by ckpt" in card
    assert b"AutoModelForCausalLM.from_pretrained" in card


KILLED = """
import os, signal, sys
from pathlib import Path
from ckpt import convert
from ckpt.hub.content.contents import contents
from ckpt.runs.run import open_checkpoint
from ckpt.weights.request import Request
made = convert.prepare(
    Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size=4000,
    request=Request(merge=True, config=Path(sys.argv[3])),
)
half, written = made.plan.nbytes // 2, 0
def progress(count):
    global written
    written += count
    if sys.argv[4] == "kill" and written > half:
        os.kill(os.getpid(), signal.SIGKILL)
convert.run(made, progress=progress)
"""


def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    run = Run("lora", tmp_path)

    def merge(output: Path, how: str) -> int:
        args = [run.checkpoint, output, run.base, how]
        command = [sys.executable, "-c", KILLED, *map(str, args)]
        return subprocess.run(command, cwd=ROOT, env=dict(os.environ), timeout=120).returncode

    assert merge(tmp_path / "one", "kill") == -9
    staged = tmp_path / ".one.partial"
    whole = sorted(path.name for path in staged.glob("*.safetensors"))
    assert whole
    times = {name: (staged / name).stat().st_mtime_ns for name in whole}

    assert merge(tmp_path / "one", "finish") == 0
    assert {n: (tmp_path / "one" / n).stat().st_mtime_ns for n in whole} == times
    assert merge(tmp_path / "two", "finish") == 0
    for path in sorted((tmp_path / "two").glob("*.safetensors*")):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


class Chat(torch.nn.Module):
    """DeepSpeed-Chat's LinearLayer_LoRA."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(outputs), requires_grad=False)
        self.lora_right_weight = torch.nn.Parameter(torch.randn(inputs, rank))
        self.lora_left_weight = torch.nn.Parameter(torch.randn(rank, outputs))


def test_deepspeed_chats_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Chat(24, 20, 4), torch.nn.LayerNorm(20))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.bfloat16())
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    output = tmp_path / "out"

    with pytest.raises(CheckpointError, match="lora_scaling of the training"):
        convert.prepare(checkpoint, output, request=Request(merge=True))
    config = tmp_path / "scale.json"
    config.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 3}))
    request = Request(merge=True, adapter_config=config)
    convert.run(convert.prepare(checkpoint, output, request=request))

    found = load_file(output / "model.safetensors")
    layer = model[0]
    product = layer.lora_left_weight.t() @ layer.lora_right_weight.t()
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(found["0.weight"], layer.weight + 3 / 4 * product)
