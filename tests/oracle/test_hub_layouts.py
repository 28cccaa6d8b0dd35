"""The layout of the Hub: every tensor as ``save_pretrained`` writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_folders
from heavy_libraries import LateModule, transformers
from oracles import ROOT, run
from run_folders import commit
from safetensors.torch import load_file, save_file

import ckpt
from ckpt.runs.upkeep import slim
from ckpt.weights.layouts import hub_layout, operations, table
from ckpt.weights.layouts.operations import NotArrangedError, Setting
from converters.computing import inputs
from converters.errors import CheckpointError
from converters.tensors import DType, Extent, Listed, TensorRef, Weights

sys.path.insert(0, str(ROOT / "scripts/tables"))

core_model_loading = LateModule("transformers.core_model_loading")
layout_proofs = LateModule("layout_proofs")
try_architectures = LateModule("try_architectures")

# experts that are joined, names that change, rows that change, tensors that are cut
CLASSES = (
    *("MixtralForCausalLM", "DeepseekV3ForCausalLM", "LlavaForConditionalGeneration"),
    *("GPTNeoXForCausalLM", "NomicBertForMaskedLM", "OlmoHybridForCausalLM"),
)


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Tensors of these shapes, which lie nowhere."""
    tensors = {}
    for name, shape in shapes.items():
        extent = Extent(Path(name), 0, 2 * torch.Size(shape).numel())
        tensors[name] = TensorRef(DType.BF16, shape, Listed([extent]))
    return Weights(tensors)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = try_architectures.tiny(getattr(transformers, name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.config.architectures = [name]
    return model


def checkpoint_of(model: Any, folder: Path, stage: int = 2) -> Path:
    checkpoint = zero_folders.save(model, folder, stage=stage)
    model.config.save_pretrained(checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", CLASSES)
def test_every_tensor_is_as_save_pretrained_writes_it(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "expected")

    made = ckpt.to_fp32(checkpoint, tmp_path / "model", check="names")

    expected = load_file(tmp_path / "expected/model.safetensors")
    written = load_file(made.path / "model.safetensors")
    assert written.keys() == expected.keys() and written.keys() != model.state_dict().keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert made.record.loads is True and "use others" not in made.verdict
    is_doubtful = any("it is not written here" in note for note in made.notes)
    assert is_doubtful == (name == "LlavaForConditionalGeneration")
    checks = made.checks
    assert checks.uncompared_tensors == () and checks.compared_tensors is not None
    assert checks.compared_tensors + (checks.uncompared_buffers or 0) == len(expected)
    with ckpt.open(checkpoint, layout="hub") as opened:
        assert all(torch.equal(opened[key], value) for key, value in expected.items())


def test_weights_in_the_layout_of_the_hub_are_compared_with_the_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("MixtralForCausalLM")
    checkpoint_of(model, folder := tmp_path / "checkpoint-2", stage=3)
    model.bfloat16().save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    run("verify", commit(folder, 2).folder, "--data")
    line = f"the values of {len(tensors)} tensors in model.safetensors are those of the states\n"
    assert capsys.readouterr().out.endswith(line)
    slim.plan(commit(folder, 2), force=True)

    save_file(tensors | {"adapter.scale": torch.ones(3)}, path)
    run("verify", commit(folder, 2).folder, "--data")
    assert "of the states; 12 B more have no counterpart there" in capsys.readouterr().out

    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    save_file(tensors | {name: tensors[name] + 1}, path)
    for options in (["--data"], ["--sample", "50%"]):
        run("verify", commit(folder, 2).folder, *options, code=1)
        assert "holds other values of model.layers.1.mlp.experts.gate" in capsys.readouterr().out


def test_the_layout_of_the_running_model_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    model = model_of("MixtralForCausalLM")
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint")

    made = ckpt.to_fp32(checkpoint, tmp_path / "model", layout="runtime", check="names")

    assert load_file(made.path / "model.safetensors").keys() == model.state_dict().keys()
    with ckpt.open(checkpoint) as opened:
        assert set(opened) == model.state_dict().keys()


@pytest.mark.parametrize("layout", ["hub", "runtime"])
@pytest.mark.parametrize("is_original", [True, False], ids=["of the Hub", "of the model"])
def test_copies_in_either_layout_prove_every_tensor(
    layout: Any, is_original: bool, tmp_path: Path
) -> None:
    model = model_of("MixtralForCausalLM")
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint", stage=3)
    model.bfloat16().save_pretrained(checkpoint, save_original_format=is_original)

    made = ckpt.to_fp32(checkpoint, tmp_path / "model", layout=layout, check="names")

    assert made.checks.compared_with == "model.safetensors"
    assert made.checks.compared_tensors == made.record.tensors
    (checkpoint / "trainer_state.json").write_text("{}")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, 50, 7] += 1
    model.save_pretrained(checkpoint, save_original_format=is_original)
    with pytest.raises(CheckpointError, match=r"other values of .*experts"):
        ckpt.to_fp32(checkpoint, tmp_path / "other", layout=layout, check="names")


def test_a_model_with_another_one_inside_has_the_layout_of_that_one(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(
        **size, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = transformers.MixtralConfig(
        **size,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=40,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39)
    model = transformers.LlavaForConditionalGeneration(config)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "expected")

    made = ckpt.to_fp32(checkpoint, tmp_path / "model", check="names")

    expected = load_file(tmp_path / "expected/model.safetensors")
    written = load_file(made.path / "model.safetensors")
    assert any("block_sparse_moe.experts.2.w3" in name for name in expected)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlavaForConditionalGeneration"])
def test_what_is_in_the_layout_of_the_hub_stays(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    layout = hub_layout.of(weights_of(shapes), model.config.to_dict(), name)
    assert layout.rule is None and layout.obstacle is None
    assert layout.weights.tensors.keys() == shapes.keys()


@pytest.mark.parametrize("type_", ["resnet", "convnext", "swin"])
def test_a_backbone_of_another_type_is_not_assumed_to_have_no_rules(type_: str) -> None:
    backbones = {
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
        "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2),
        "swin": transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2]),
    }
    backbones[type_].out_features = ["stage1", "stage2"]
    config = transformers.UperNetConfig(
        backbone_config=backbones[type_], hidden_size=8, pool_scales=[1], use_auxiliary_head=False
    )
    with torch.device("meta"):
        model = transformers.UperNetForSemanticSegmentation(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = core_model_loading.revert_weight_conversion(model, model.state_dict())

    layout = hub_layout.of(weights_of(state), model.config.to_dict(), type(model).__name__)

    is_alike = layout.weights.tensors.keys() == expected.keys()
    assert is_alike or "or not with these parts" in (layout.obstacle or "")
    assert is_alike == (type_ != "swin")


def test_select_means_the_names_that_are_written(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(model_of("MixtralForCausalLM"), tmp_path / "checkpoint")
    made = ckpt.to_fp32(checkpoint, tmp_path / "model", select="*experts.1.w*", check="none")
    assert len(load_file(made.path / "model.safetensors")) == 2 * 3
    sources = set(made.record.renamed.values())
    assert sources == {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }


def test_the_names_of_a_class_that_is_not_in_the_table_stay_and_it_is_said(tmp_path: Path) -> None:
    model = model_of("MixtralForCausalLM")
    model.config.architectures = ["MyMixtral"]
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint")
    made = ckpt.to_fp32(checkpoint, tmp_path / "model", check="names")
    assert load_file(made.path / "model.safetensors").keys() == model.state_dict().keys()
    assert any("MyMixtral is not in the table of layouts" in note for note in made.notes)
    with pytest.raises(CheckpointError, match="MyMixtral is not in the table of layouts"):
        ckpt.open(checkpoint, layout="hub")


EXPERTS = "model.layers.0.mlp.experts"
OBSTACLES = {
    "is quantized": {"packed": frozenset({f"{EXPERTS}.gate_up_proj"})},
    "is tied to": {"aliases": {f"{EXPERTS}.gate_up_proj": "a"}},
    "is not there": {"absent": {f"{EXPERTS}.gate_up_proj": "lost"}},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_tensors_that_cannot_be_cut_leave_the_layout_as_it_is(reason: str) -> None:
    shapes = {"a": (2, 8, 4), f"{EXPERTS}.down_proj": (2, 4, 4)}
    if reason == "is quantized":
        shapes[f"{EXPERTS}.gate_up_proj"] = (2, 8, 4)
    weights = Weights(weights_of(shapes).tensors, **OBSTACLES[reason])  # type: ignore[arg-type]
    layout = hub_layout.of(weights, {"model_type": "mixtral"}, "MixtralForCausalLM")
    assert layout.weights is weights
    assert f"{EXPERTS}.gate_up_proj {reason}" in (layout.obstacle or "")


# name -> sources, targets, shapes, and the operation's arguments
OPERATIONS: dict[str, tuple[list[str], list[str], tuple[int, ...], list[Any]]] = {
    "SplitModulelist": (["experts.x"], ["experts.*.x"], (3, 4, 5), [0]),
    "Chunk": (["conv"], ["q", "k", "v"], (7, 4), [0]),
    "Concatenate": (["q", "k", "v"], ["qkv"], (6, 4), [1]),
    "Interleave": (["x"], ["y"], (3, 6, 5), [1, True]),
    "Transpose": (["x"], ["y"], (3, 4, 5), [1, 2, False]),
    "ErnieSplitAndDecoupleTextVisionExperts": (
        ["text.up", "vision.up"],
        ["experts.*.gate", "experts.*.up"],
        (3, 8, 5),
        [0, 1],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_that_of_transformers_gives(name: str, tmp_path: Path) -> None:
    sources, targets, shape, arguments = OPERATIONS[name]
    tensors = {source: torch.randn(shape) for source in sources}
    operation = getattr(core_model_loading, name)(*arguments)
    inner = {source: [tensor] for source, tensor in tensors.items()}
    expected = operation.convert(
        inner, source_patterns=sources, target_patterns=targets, config=None
    )

    refs = {source: ref_of(tensor, tmp_path / source) for source, tensor in tensors.items()}
    made = operations.apply([[name, *arguments]], refs, Setting(tuple(sources), tuple(targets), {}))

    same(made, expected)


@pytest.mark.parametrize("shape", [(16, 6), (16,)], ids=["weight", "bias"])
@pytest.mark.parametrize(
    "stated",
    [{"vision_config": {"heads": 4}}, {"transformers_version": "5.23.0"}],
    ids=["stated", "default"],
)
def test_rows_are_permuted_by_the_heads_that_config_json_states(
    shape: tuple[int, ...], stated: dict[str, Any], tmp_path: Path
) -> None:
    heads = 4 if "vision_config" in stated else 2
    tensors = {name: torch.randn(shape) for name in ("q_proj", "v_proj")}
    operation = core_model_loading.PermuteForRope(permute_layer_names=["q_proj"], inverse=True)
    expected = operation.convert(
        dict(tensors),
        source_patterns=["q_proj", "v_proj"],
        target_patterns=["qv"],
        config=transformers.LlamaConfig(num_attention_heads=heads),
    )
    refs = {source: ref_of(tensor, tmp_path / source) for source, tensor in tensors.items()}
    rule = ["PermuteForRope", ["vision_config.heads", 2], ["q_proj"]]

    made = operations.apply([rule], refs, Setting(("q_proj", "v_proj"), ("qv",), stated))

    same(made, expected)


def test_a_number_that_config_json_may_have_under_an_older_name_is_not_assumed() -> None:
    config = {"vision_config": {"heads": 4}, "transformers_version": "4.57.6"}
    setting = Setting(("q_proj",), ("wq",), config)
    with pytest.raises(NotArrangedError, match=r"num_attention_heads is not in config\.json"):
        setting.number(["vision_config.num_attention_heads", 2])


NAMES = {
    "the names of a file": ["model.layers.0.block_sparse_moe.gate.weight"],
    "the names of a running model": ["model.layers.0.mlp.gate.weight"],
    "names of both kinds": [
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
    ],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_only_the_names_of_a_running_model_are_changed(names: list[str]) -> None:
    weights = weights_of({"model.norm.weight": (4,), **dict.fromkeys(names, (2, 4))})
    config = {"model_type": "mixtral", "num_hidden_layers": 2}

    layout = hub_layout.of(weights, config, "MixtralForCausalLM")

    is_changed = "model.layers.0.block_sparse_moe.gate.weight" in layout.sources
    assert is_changed == (names == NAMES["the names of a running model"])
    assert is_changed or layout.weights is weights
    is_doubtful = "do not tell which of both they are" in (layout.obstacle or "")
    assert is_doubtful == (names == NAMES["names of both kinds"])


def same(made: dict[str, TensorRef], expected: dict[str, Any]) -> None:
    assert made.keys() == expected.keys()
    for target, value in expected.items():
        value = value[0] if isinstance(value, list) else value
        numbers = inputs.load(made[target]).reshape(made[target].shape)
        assert torch.equal(torch.from_numpy(numbers.copy()), value), target


def ref_of(tensor: torch.Tensor, path: Path) -> TensorRef:
    data = tensor.numpy().tobytes()
    path.write_bytes(data)
    return TensorRef(DType.F32, tuple(tensor.shape), Listed([Extent(path, 0, len(data))]))


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "CLIPModel", "LlamaForCausalLM"])
def test_the_table_is_what_the_installed_transformers_does(name: str) -> None:
    proof = layout_proofs.prove(name)
    assert proof.holds, proof.difference
    assert proof.compared == layout_proofs.VALUES


def test_every_operation_of_the_table_is_one_that_ckpt_knows() -> None:
    rules = (rule for rules in table._table()["rules"] for rule in rules)
    names = {operation[0] for rule in rules if rule[0] == "convert" for operation in rule[4]}
    assert names and names <= operations._OPERATIONS.keys()
