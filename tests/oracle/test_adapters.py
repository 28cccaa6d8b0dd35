"""PEFT checkpoints become adapter folders that PEFT loads: what save_pretrained would write."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
import zero_folders
from heavy_libraries import peft
from run_folders import commit
from safetensors.torch import load_file, save_file

import ckpt
from ckpt.cli import report
from ckpt.hub.content.contents import contents
from ckpt.runs.run import open_checkpoint
from ckpt.weights.adapters import adapter_folder
from ckpt.weights.conversion import convert
from ckpt.weights.request import Naming, Request
from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint
from converters.errors import CheckpointError
from converters.tensors import DType, Extent, TensorRef, Weights
from converters.zero import checkpoint as zero

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trainer(kind: str, root: Path, stage: int = 2, exclude_frozen: bool = True, **how: Any) -> Path:
    """A Trainer's checkpoint of a PEFT model: states, adapter_config.json; and ``live`` beside it,
    what save_pretrained of the model with fp32 masters writes."""
    model = peft_models.model(kind)
    peft_models.saved(model, root / "live")
    _frozen_in_16_bits(model)
    peft_models.saved(model, root / "live")
    checkpoint = zero_folders.save(model, root / "checkpoint-2", stage, 2, exclude_frozen, **how)
    shutil.copy(root / "live" / CONFIG, checkpoint)
    return checkpoint


def _frozen_in_16_bits(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if not value.requires_grad and value.is_floating_point():
                value.copy_(value.bfloat16().float())


def to_fp32(checkpoint: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    output = checkpoint.with_name("out")
    made = convert.prepare(checkpoint, output, **options)
    return output, convert.run(made, overwrite=True)


COMPUTED = ("p-tuning", "prefix-projection")
LAYOUTS = ((2, False), (2, True), (3, False))  # stage, exclude_frozen
WIDE = ("lora", "dora", "embedding", "saved-modules", "tied-saved", "tied-tokens", "prompt")
STORED = [kind for kind in peft_models.KINDS if kind not in COMPUTED]
MATRIX = [
    (kind, *layout)
    for number, kind in enumerate(STORED)
    for layout in (LAYOUTS if kind in WIDE else (LAYOUTS[number % 3],))
] + [("lora", 1, False), ("saved-modules", 1, True)]


@pytest.mark.parametrize(("kind", "stage", "exclude_frozen"), MATRIX)
def test_the_file_is_that_of_save_pretrained_byte_for_byte(
    kind: str, stage: int, exclude_frozen: bool, tmp_path: Path
) -> None:
    checkpoint = trainer(kind, tmp_path, stage, exclude_frozen)

    output, facts = to_fp32(checkpoint)

    live, ours = load_file(tmp_path / "live" / FILE), load_file(output / FILE)
    whole = {n for n in live if n.endswith("base_layer.weight")} if exclude_frozen else set()
    assert set(live) - whole <= set(ours) <= set(live)  # a tied one stays in the states
    if not whole:
        assert (output / FILE).read_bytes() == (tmp_path / "live" / FILE).read_bytes()
    assert all(torch.equal(value, live[name]) for name, value in ours.items())
    assert (output / CONFIG).read_bytes() == (checkpoint / CONFIG).read_bytes()
    assert facts["kind"] == "adapter"


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_prompts_network_is_run(kind: str, stage: int, tmp_path: Path) -> None:
    checkpoint = trainer(kind, tmp_path, stage)

    output, _ = to_fp32(checkpoint)

    live, ours = load_file(tmp_path / "live" / FILE), load_file(output / FILE)
    assert set(ours) == set(live) == {"prompt_embeddings"}
    torch.testing.assert_close(ours["prompt_embeddings"], live["prompt_embeddings"])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_state_of_an_adapter_is_loaded_into_a_peft_model(
    stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = trainer("lora", tmp_path, stage)
    live = peft_models.model("lora")
    model = peft_models.model("lora")
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2 if value.requires_grad else 1)

    load_state_dict_from_zero_checkpoint(model, checkpoint)
    assert "left as they are in the model: 21 frozen parameters (base" in caplog.text

    wanted = live.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_trained_parameter_without_a_value_is_an_error(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path)
    model = peft_models.model("rslora")
    model.base_model.model.lm_head.weight.requires_grad_(True)

    with pytest.raises(CheckpointError, match=r"no value: base_model.model.lm_head.weight"):
        load_state_dict_from_zero_checkpoint(model, checkpoint)


def test_nothing_is_left_as_it_is_where_no_name_fits(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path)
    model = peft_models.llama().requires_grad_(False)

    words = r"(?s)21 tensors of the model have no value.*give the model that get_peft_model or"
    with pytest.raises(CheckpointError, match=words):
        load_state_dict_from_zero_checkpoint(model, checkpoint)


@pytest.mark.parametrize("kind", ["dora", "saved-modules", "prompt", "p-tuning", "gpt2"])
def test_an_opened_checkpoint_has_the_adapter_and_the_base(kind: str, tmp_path: Path) -> None:
    checkpoint = trainer(kind, tmp_path, exclude_frozen=False)
    live = load_file(tmp_path / "live" / FILE)
    original = peft_models.KINDS[kind][0]().state_dict()

    with ckpt.open(checkpoint) as opened:
        adapter, base = opened.adapter, opened.base
        torch.testing.assert_close(dict(adapter), live, rtol=1e-6, atol=1e-7)
        assert set(base) == set(original)
        assert all(value.shape == original[name].shape for name, value in base.items())


def test_an_adapter_is_opened_with_a_configuration_that_is_given(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path)
    config = (checkpoint / CONFIG).rename(tmp_path / "other.json")

    with ckpt.open(checkpoint) as opened, pytest.raises(CheckpointError, match=CONFIG):
        assert opened.adapter
    with ckpt.open(checkpoint, adapter_config=config) as opened:
        assert set(opened.adapter) == set(load_file(tmp_path / "live" / FILE))
        assert dict(opened.base) == {}
    with ckpt.open(tmp_path / "live") as opened:
        assert len(opened) == 8 and not opened.adapters


def several(root: Path, **how: Any) -> Path:
    """A model with the adapters ``default``, trained before, and ``second``, in training."""
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["norm"])
    model = peft_models.model("lora", second=config)
    model.base_model.set_requires_grad(["default", "second"])
    _frozen_in_16_bits(model)
    peft_models.saved(model, root / "live")
    checkpoint = zero_folders.save(model, root / "checkpoint-2", 3, **how)
    for name in ("", "second"):
        (checkpoint / name).mkdir(exist_ok=True)
        shutil.copy(root / "live" / name / CONFIG, checkpoint / name)
    return checkpoint


def test_several_adapters_lie_where_peft_puts_them(tmp_path: Path) -> None:
    checkpoint = several(tmp_path)

    output, facts = to_fp32(checkpoint)

    for name in ("", "second"):
        for file in (FILE, CONFIG):
            ours, live = output / name / file, tmp_path / "live" / name / file
            assert ours.read_bytes() == live.read_bytes(), ours
    assert facts["verdict"].startswith("loads as 2 adapters (default and second) of")
    assert {file["name"] for file in facts["files"]} == {FILE, f"second/{FILE}"}


def test_one_adapter_of_several_is_chosen(tmp_path: Path) -> None:
    checkpoint = several(tmp_path)

    output, _ = to_fp32(checkpoint, request=Request(Naming(part="second")))

    assert (output / FILE).read_bytes() == (tmp_path / "live" / "second" / FILE).read_bytes()
    assert not (output / "second").exists()
    with pytest.raises(CheckpointError, match="no such adapter; the adapters are default, second"):
        convert.prepare(checkpoint, request=Request(Naming(part="default,third")))

    output, _ = to_fp32(checkpoint, request=Request(Naming(part="second,default")))

    for inner in (".", "second"):
        expected = tmp_path / "live" / inner / FILE
        assert (output / inner / FILE).read_bytes() == expected.read_bytes()


def test_a_resized_vocabulary_brings_the_embeddings(tmp_path: Path) -> None:
    base = tmp_path / "base"
    peft_models.llama().save_pretrained(base)
    for exclude_frozen in (False, True):
        root = tmp_path / str(exclude_frozen)
        model = peft_models.model("lora")
        model.base_model.model.resize_token_embeddings(44, mean_resizing=False)
        _frozen_in_16_bits(model)
        model.peft_config["default"].base_model_name_or_path = str(base)
        live = load_file(peft_models.saved(model, root / "live") / FILE)
        assert live["base_model.model.lm_head.weight"].shape[0] == 44
        checkpoint = zero_folders.save(model, root / "checkpoint-2", exclude_frozen=exclude_frozen)
        shutil.copytree(root / "live", checkpoint, dirs_exist_ok=True)

        output, _ = to_fp32(checkpoint)

        ours = load_file(output / FILE)
        assert set(ours) == set(live)
        assert all(torch.equal(value, live[name]) for name, value in ours.items())


@pytest.mark.parametrize("with_file", [True, False])
def test_embeddings_trained_whole_of_a_resized_vocabulary_need_no_originals(
    with_file: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    peft_models.llama().save_pretrained(base)
    resized = peft_models.llama()
    resized.resize_token_embeddings(44, mean_resizing=False)
    model = peft.get_peft_model(resized, peft_models.KINDS["saved-modules"][1]())
    _frozen_in_16_bits(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    live = load_file(peft_models.saved(model, tmp_path / "live") / FILE)
    originals = {name for name in live if ".original_module." in name}
    assert len(originals) == 2  # PEFT saves them, and passes them over when it loads
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=True)
    shutil.copytree(tmp_path / "live", checkpoint, dirs_exist_ok=True)
    if not with_file:
        (checkpoint / FILE).unlink()

    output, _ = to_fp32(checkpoint)

    ours = load_file(output / FILE)
    assert set(ours) == set(live) - (set() if with_file else originals)
    assert all(torch.equal(value, live[name]) for name, value in ours.items())


def test_an_original_that_is_no_embedding_tells_of_no_resized_vocabulary(tmp_path: Path) -> None:
    base = peft_models.llama(bias=True)
    config = peft_models.KINDS["lora"][1]()
    config.bias, config.modules_to_save = "all", ["self_attn"]
    config.target_modules = {"down_proj"}
    model = peft.get_peft_model(base, config)
    live = load_file(peft_models.saved(model, tmp_path / "live") / FILE)
    assert any(".original_module." in name for name in live)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=True)
    shutil.copytree(tmp_path / "live", checkpoint, dirs_exist_ok=True)

    output, _ = to_fp32(checkpoint)

    assert set(load_file(output / FILE)) == set(live)


def test_adalora_keeps_the_ranks_of_its_budget(tmp_path: Path) -> None:
    model = peft_models.model("adalora")
    for config in model.peft_config.values():
        pattern = {
            f"model.layers.{n}.self_attn.q_proj.lora_E": [True, n == 0, True, False] for n in (0, 1)
        }
        config.rank_pattern = pattern
    _frozen_in_16_bits(model)
    peft_models.saved(model, tmp_path / "live")
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    shutil.copy(tmp_path / "live" / CONFIG, checkpoint)

    output, _ = to_fp32(checkpoint)

    assert (output / FILE).read_bytes() == (tmp_path / "live" / FILE).read_bytes()


def test_a_model_that_was_given_an_adapter_without_peft_model(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = peft_models.llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    model.save_pretrained(tmp_path / "live")
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    shutil.copy(tmp_path / "live" / CONFIG, checkpoint)

    output, _ = to_fp32(checkpoint)

    assert (output / FILE).read_bytes() == (tmp_path / "live" / FILE).read_bytes()


def test_peft_loads_the_folder_with_nothing_missing(tmp_path: Path) -> None:
    from peft import PeftModel

    checkpoint = trainer("saved-modules", tmp_path, exclude_frozen=False)
    output, _ = to_fp32(checkpoint)

    model = PeftModel.from_pretrained(peft_models.llama(), output)
    result = model.load_adapter(str(output), "again")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "again" in name]
    live = load_file(tmp_path / "live" / FILE)
    state = model.state_dict()
    for name in (n for n in live if "lora_" in n):
        head, _, last = name.rpartition(".")
        assert torch.equal(state[f"{head}.default.{last}"], live[name])


@pytest.mark.parametrize("name", ["weight", "bias", "original_module", "token_adapter", "lora_B"])
def test_an_adapter_may_be_called_as_peft_calls_its_parts(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(peft_models.llama(), config, adapter_name=name)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    config.save_pretrained(checkpoint)

    output, facts = to_fp32(checkpoint)

    assert not facts["notes"], facts["notes"]
    loaded = peft.PeftModel.from_pretrained(peft_models.llama(), output, adapter_name="a")
    state = loaded.state_dict()
    ends = {f".{end.format(name)}": f".{end.format('a')}" for end in ("{}.weight", "{}")}
    for old, value in model.state_dict().items():
        end = next((end for end in ends if old.endswith(end)), None)
        if ("lora_" in old or "modules_to_save" in old) and end:
            assert torch.equal(state[old.removesuffix(end) + ends[end]], value), old


def test_beside_an_adapter_lies_what_its_reader_wants(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path, exclude_frozen=False)
    names = ("config.json", "generation_config.json", "tokenizer.json", "README.md", "model.py")
    for name in names:
        (checkpoint / name).write_text("{}")

    output, facts = to_fp32(checkpoint)

    found = {path.name for path in output.iterdir()}
    assert found == {FILE, CONFIG, "tokenizer.json", "README.md", "conversion.json"}
    assert not facts["notes"]


def test_the_files_own_values_prove_the_adapter(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path, stage=3)
    live = load_file(tmp_path / "live" / FILE)
    stored = {name: value.bfloat16() for name, value in live.items()}
    save_file(stored, checkpoint / FILE)
    (checkpoint / "trainer_state.json").write_text("{}")

    _, facts = to_fp32(checkpoint)
    assert facts["checks"]["compared_with"] == FILE and facts["checks"]["compared_tensors"] == 8

    stored[next(iter(stored))] += 1
    save_file(stored, checkpoint / FILE)
    with pytest.raises(CheckpointError, match="of different saves"):
        to_fp32(checkpoint)

    del stored[next(iter(stored))]
    extra = {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}
    save_file(stored | extra, checkpoint / FILE)
    with pytest.raises(CheckpointError, match=r"would not load the adapter: .*layers\.2"):
        to_fp32(checkpoint)


def test_a_file_without_values_is_named(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path, stage=3)
    empty = {name: torch.empty(0) for name in load_file(tmp_path / "live" / FILE)}
    save_file(empty, checkpoint / FILE)

    _, facts = to_fp32(checkpoint)

    assert facts["loads"] is True
    assert any("holds no values" in note for note in facts["notes"])
    shown = "\n".join(report.show_lines(report.show(zero.read(checkpoint))))
    assert "holds no values" in shown


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    model = peft_models.model("lora")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    del layer.lora_B["default"]
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=True)
    model.peft_config["default"].save_pretrained(checkpoint)

    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B: not in the checkpoint"):
        convert.prepare(checkpoint)


def test_what_is_trained_beside_the_adapter_is_named(tmp_path: Path) -> None:
    model = peft_models.model("lora")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    model.peft_config["default"].save_pretrained(checkpoint)

    notes = convert.prepare(checkpoint).notes

    assert [note for note in notes if "model.norm.weight: trained, but not part" in note]


def test_deepspeed_chats_lora_is_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 6)
    model.lora_right_weight = torch.nn.Parameter(torch.ones(4, 2))
    model.lora_left_weight = torch.nn.Parameter(torch.ones(2, 6))
    model.weight.requires_grad_(False)
    checkpoint = zero_folders.save(model, tmp_path / "save")

    with pytest.raises(
        CheckpointError, match=r"DeepSpeed-Chat .* merge=True with adapter_config=FILE"
    ):
        convert.prepare(checkpoint)
    facts = report.show(zero.read(checkpoint))
    assert "LoRA of DeepSpeed-Chat, r=2" in "\n".join(report.show_lines(facts))
    assert facts.parameters == 20


def test_show_counts_what_is_trained(tmp_path: Path) -> None:
    checkpoint = trainer("dora", tmp_path, exclude_frozen=False)

    facts = report.show(zero.read(checkpoint))
    text = "\n".join(report.show_lines(facts))

    trained = [p for p in peft_models.model("dora").parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    assert facts.parameters == count
    assert f"LoRA (DoRA) adapter, r=4, of a base model that no {CONFIG} names" in text
    assert f"{count:,} trained parameters in {len(trained)} tensors" in text
    whole = sum(p.numel() for p in peft_models.llama().parameters())
    assert facts.adapter and facts.adapter.base_parameters == whole


def test_show_tells_adapters_apart(tmp_path: Path) -> None:
    model = peft_models.model("lora", reference=peft_models.KINDS["lora"][1]())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=False)

    text = "\n".join(report.show_lines(report.show(zero.read(checkpoint))))

    default, reference = (line for line in text.splitlines() if line.startswith("adapter '"))
    assert "adapter 'default' LoRA adapter" in default and "trained parameters in" in default
    assert "'reference' LoRA adapter" in reference and "frozen parameters in" in reference


def test_a_push_sends_the_adapter_of_the_states(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path, stage=3)
    empty = {name: torch.empty(0) for name in load_file(tmp_path / "live" / FILE)}
    save_file(empty, checkpoint / FILE)
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "config.json").write_text("{}")

    found = contents(open_checkpoint(checkpoint), max_shard_size=1 << 40)

    assert {item.name for item in found.items} == {FILE, CONFIG, "README.md"}
    assert found.facts["kind"] == "adapter" and found.facts["parameters"] == 576
    sizes = {item.name: item.nbytes for item in found.items}
    assert sizes[FILE] == (tmp_path / "live" / FILE).stat().st_size

    shutil.rmtree(checkpoint / zero_folders.TAG)
    (checkpoint / "latest").unlink()
    with pytest.raises(CheckpointError, match="without elements"):
        contents(commit(checkpoint, 2, tier="weights"), max_shard_size=1 << 40)


def test_a_network_that_is_not_run_is_named(tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, get_peft_model

    lstm = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_hidden_size=4,
        encoder_reparameterization_type="LSTM",
    )
    model = get_peft_model(peft_models.llama(), lstm)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=True)
    model.peft_config["default"].save_pretrained(checkpoint)

    with pytest.raises(CheckpointError, match="LSTM"):
        convert.prepare(checkpoint)


def test_a_kind_that_is_not_known_is_named(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {"base_model": torch.nn.ModuleDict({"x_odd": torch.nn.Linear(2, 2)})}
    )
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2")
    (checkpoint / CONFIG).write_text('{"peft_type": "XLORA"}')

    with pytest.raises(CheckpointError, match="XLORA are not written yet"):
        convert.prepare(checkpoint)


def test_a_model_around_a_peft_model_is_taken_off_the_names(tmp_path: Path) -> None:
    model = peft_models.model("lora")
    _frozen_in_16_bits(model)
    peft_models.saved(model, tmp_path / "live")
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", prefix="llm.")
    shutil.copy(tmp_path / "live" / CONFIG, checkpoint)

    output, _ = to_fp32(checkpoint)

    assert (output / FILE).read_bytes() == (tmp_path / "live" / FILE).read_bytes()


def test_several_adapters_are_each_proven_by_their_own_files(tmp_path: Path) -> None:
    checkpoint = several(tmp_path)
    (checkpoint / "trainer_state.json").write_text("{}")
    for name in ("", "second"):
        stored = load_file(tmp_path / "live" / name / FILE)
        save_file({n: value.bfloat16() for n, value in stored.items()}, checkpoint / name / FILE)

    _, facts = to_fp32(checkpoint)
    assert facts["checks"]["compared_tensors"] == 8 + 9

    (checkpoint / "second" / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"adapter, r=2 'second' on v_proj.* adapter_config="):
        convert.prepare(checkpoint)


@pytest.mark.parametrize("wrapper", ["pretrained_model", "module", "_orig_mod"])
@pytest.mark.parametrize("kind", ["saved-modules", "prompt"])
def test_wrappers_come_off_the_names(wrapper: str, kind: str, tmp_path: Path) -> None:
    model = peft_models.model(kind)
    _frozen_in_16_bits(model)
    peft_models.saved(model, tmp_path / "live")
    parts = {wrapper: model}
    if wrapper == "pretrained_model":  # of trl
        parts["v_head"] = torch.nn.Linear(peft_models.HIDDEN, 1)
    checkpoint = zero_folders.save(torch.nn.ModuleDict(parts), tmp_path / "checkpoint-2")
    shutil.copy(tmp_path / "live" / CONFIG, checkpoint)

    output, facts = to_fp32(checkpoint)

    assert (output / FILE).read_bytes() == (tmp_path / "live" / FILE).read_bytes()
    heads = [note for note in facts["notes"] if "v_head.weight, v_head.bias: trained, but" in note]
    assert len(heads) == (wrapper == "pretrained_model")


@pytest.mark.parametrize("name", ["/tmp/evil", "..\\evil", "a/b"])
def test_an_adapters_name_is_no_way_out_of_the_folder(name: str, tmp_path: Path) -> None:
    path = f"base_model.model.q.lora_A.{name}.weight"
    ref = TensorRef(DType.F32, (2, 2), (Extent(tmp_path / "x", 0, 16),))
    with pytest.raises(CheckpointError, match="which no folder can have"):
        adapter_folder.recognized(Weights({path: ref}), tmp_path, Request())


def test_thousands_of_adapters_are_refused_at_once(tmp_path: Path) -> None:
    ref = TensorRef(DType.F32, (2, 2), (Extent(tmp_path / "x", 0, 16),))
    tensors = {f"base_model.model.q.lora_A.a{n}.weight": ref for n in range(5000)}
    with pytest.raises(CheckpointError, match="5000 adapters, expected at most"):
        adapter_folder.recognized(Weights(tensors), tmp_path, Request())


@pytest.mark.parametrize(
    "naming",
    [Naming(strip=("base_model.",)), Naming(rename=(("a", "b"),)), Naming(select=("*lora_A*",))],
)
def test_names_of_an_adapter_are_not_wished_for(naming: Naming, tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path)
    with pytest.raises(CheckpointError, match="under the names that PEFT loads"):
        convert.prepare(checkpoint, request=Request(naming))


def test_as_stored_writes_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = trainer("lora", tmp_path)
    output, facts = to_fp32(checkpoint, request=Request(Naming(as_stored=True)))
    stored = load_file(output / "model.safetensors")
    assert facts["kind"] == "model" and all(".default." in name for name in stored)


def test_options_for_an_adapter_where_none_is(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    zero_folders.save(peft_models.llama(), checkpoint)
    why = "holds no PEFT adapter"
    with pytest.raises(CheckpointError, match=f"merge=True: .*{why}"):
        to_fp32(checkpoint, request=Request(merge=True))

    other = tmp_path / "base"
    other.mkdir()
    _, facts = to_fp32(checkpoint, request=Request(base=other, adapter_config=other))

    idle = [note for note in facts["notes"] if "has no effect" in note]
    assert len(idle) == 2 and all(why in note for note in idle)


@pytest.mark.parametrize(
    "wish", [{"merge": True}, {"base": Path("base")}, {"adapter_config": Path("base")}]
)
def test_options_for_an_adapter_do_not_go_with_names_as_stored(
    wish: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = trainer("lora", tmp_path)
    with pytest.raises(CheckpointError, match=r"does not go with Naming\(as_stored=True\)"):
        to_fp32(checkpoint, request=Request(Naming(as_stored=True), **wish))


def test_a_pickle_for_old_versions_of_peft_loads_too(tmp_path: Path) -> None:
    from peft import PeftModel

    checkpoint = trainer("saved-modules", tmp_path)
    output, _ = to_fp32(checkpoint, format="bin", dtype="bf16")

    assert (output / "adapter_model.bin").is_file()
    model = PeftModel.from_pretrained(peft_models.llama(), output)
    live = load_file(tmp_path / "live" / FILE)["base_model.model.lm_head.weight"]
    saved = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(saved, live.bfloat16().float())


def test_a_push_sends_every_adapter(tmp_path: Path) -> None:
    checkpoint = several(tmp_path)
    found = contents(open_checkpoint(checkpoint), max_shard_size=1 << 40, card=False)
    names = {item.name for item in found.items}
    assert names == {FILE, CONFIG, f"second/{FILE}", f"second/{CONFIG}"}


def test_a_tied_name_that_stays_is_no_base_and_what_is_trained_besides_is_counted(
    tmp_path: Path,
) -> None:
    model = peft_models.model("tied-saved")
    for value in model.parameters():
        value.requires_grad_(False)
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.q_proj.lora_A.default.weight.requires_grad_(True)
    layer.input_layernorm.weight.requires_grad_(True)
    checkpoint = zero_folders.save(model, tmp_path / "checkpoint-2", exclude_frozen=True)

    facts = report.show(zero.read(checkpoint))

    assert facts.adapter and facts.adapter.base_parameters == 0
    assert facts.adapter.other_parameters == peft_models.HIDDEN
    assert "also trained 16 parameters outside of the adapter" in "\n".join(
        report.show_lines(facts)
    )
