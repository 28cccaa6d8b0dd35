"""--names hf: names of pipelines, Megatron and AutoEP as the model in transformers has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
import zero_folders
from heavy_libraries import transformers
from made_checkpoints import make_checkpoint
from oracles import FIXTURES, live, run
from safetensors.torch import load_file

import ckpt
from ckpt.weights.layouts import framework_tables
from converters.errors import CheckpointError

SPLIT = FIXTURES / "pipelines-and-experts"
LAYERS, HEADS, GROUPS, SIZE, INNER, WORDS = 2, 4, 2, 16, 24, 32
Tensors = dict[str, torch.Tensor]


WITH_LOGITS = sorted(path.name for path in SPLIT.glob("*-logits*"))


@pytest.mark.parametrize("name", WITH_LOGITS)
@pytest.mark.parametrize("layout", ["hub", "runtime"])
def test_the_logits_are_those_of_the_trained_model(name: str, layout: Any, tmp_path: Path) -> None:
    output = ckpt.to_fp32(SPLIT / name, tmp_path / "model", names="hf", layout=layout)
    assert output.verdict.startswith("loads as ")
    recorded = live(SPLIT / name)["logits"]
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=recorded["ids"], use_cache=False).logits
    # Not equal: the sums of another processor's kernels are rounded otherwise.
    torch.testing.assert_close(logits, recorded["values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["neox-zero1-logits", "autoep-zero2-logits"])
def test_names_that_a_table_has_are_those_of_the_model_unasked(name: str, tmp_path: Path) -> None:
    ckpt.to_fp32(SPLIT / name, tmp_path / "model", check="names")
    ckpt.to_fp32(SPLIT / name, tmp_path / "asked", names="hf")
    (path,) = (tmp_path / "asked").glob("*.safetensors")
    assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_who_has_names_of_another_model_is_told_whose_they_are(tmp_path: Path) -> None:
    source = SPLIT / "neox-zero1-logits"
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] += 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    hint = 'these look like GPT-NeoX pipeline names: names="hf" says what hinders it'
    for names, reason in (("reader", hint), ("hf", "and config.json has 6")):
        with pytest.raises(CheckpointError, match=reason):
            ckpt.to_fp32(source, tmp_path / "o", names=names, config=tmp_path, check="names")


@pytest.mark.parametrize("name", ["neox-zero1-logits", "autoep-zero2-logits"])
@pytest.mark.parametrize("layout", ["hub", "runtime"])
def test_what_is_opened_and_shown_has_the_names_that_are_written(
    name: str, layout: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt.to_fp32(SPLIT / name, tmp_path / "model", names="hf", layout=layout)
    written = load_file(tmp_path / "model" / "model.safetensors")
    with ckpt.open(SPLIT / name, names="hf", layout=layout) as opened:
        assert opened.keys() >= written.keys()
        assert all(torch.equal(opened[name], value) for name, value in written.items())

    if layout == "runtime":
        run("show", SPLIT / name, "--tensors", "--names", "hf", "--json")
        assert json.loads(capsys.readouterr().out)["tensors_by_name"].keys() >= written.keys()


def test_names_that_are_the_models_already_stay_and_a_note_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = FIXTURES / "trainer-zero2/checkpoint-2"
    with ckpt.open(checkpoint) as stored, ckpt.open(checkpoint, names="hf") as opened:
        assert list(opened) == list(stored)
    run("show", checkpoint, "--names", "hf")
    assert "note         --names hf changes nothing: these are no names of" in (
        capsys.readouterr().out
    )


def test_an_adapter_is_opened_under_the_checkpoints_names_alone(tmp_path: Path) -> None:
    zero_folders.save(peft_models.model("lora"), tmp_path, exclude_frozen=True)
    with pytest.raises(CheckpointError, match=r'holds an adapter.*leave names="reader" out: ckpt'):
        ckpt.open(tmp_path, names="reader")
    with pytest.raises(CheckpointError, match="names is 'x'; expected one of 'reader', "):
        ckpt.open(tmp_path, names="x")  # type: ignore[arg-type]


def test_every_weight_is_compared_with_its_16_bit_copy(tmp_path: Path) -> None:
    """Also those that are joined of several."""
    source = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "parallel/aeptp_mixtral_z2_w4", source)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(source)
    for layout in ("hub", "runtime"):
        run("to-fp32", source, "--names", "hf", "--layout", layout, "-o", tmp_path / layout)
        checks = json.loads((tmp_path / layout / "conversion.json").read_text())["checks"]
        assert checks["compared_tensors"] == len(load_file(tmp_path / layout / "model.safetensors"))


def llama_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        attention_bias=True,
        tie_word_embeddings=False,
    )


def llama() -> tuple[dict[str, Any], Tensors]:
    """The configuration and the weights of a tiny Llama with groups of heads and with biases."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(llama_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    return config, {name: p.detach().clone() for name, p in model.named_parameters()}


def megatron(weights: Mapping[str, torch.Tensor], prefix: str, first: int = 0) -> Tensors:
    """The layers as Megatron packs them (tools/checkpoint/loader_llama_mistral.py)."""
    packed: Tensors = {}
    for number in range(LAYERS):
        old = f"model.layers.{number}."
        new = f"{prefix}{number + first}."
        for kind in ("weight", "bias"):
            q, k, v = (
                weights[f"{old}self_attn.{part}_proj.{kind}"].unflatten(0, (GROUPS, -1))
                for part in "qkv"
            )
            packed[f"{new}self_attention.query_key_value.{kind}"] = torch.cat([q, k, v], 1).flatten(
                0, 1
            )
            packed[f"{new}self_attention.dense.{kind}"] = weights[f"{old}self_attn.o_proj.{kind}"]
        gate, up = (weights[f"{old}mlp.{part}_proj.weight"] for part in ("gate", "up"))
        packed[f"{new}mlp.dense_h_to_4h.weight"] = torch.cat([gate, up])
        packed[f"{new}mlp.dense_4h_to_h.weight"] = weights[f"{old}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            packed[f"{new}{norm}.weight"] = weights[f"{old}{norm}.weight"]
    return packed


def of_megatron(weights: Mapping[str, torch.Tensor]) -> Tensors:
    inner = "language_model."
    return {
        f"{inner}embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        **megatron(weights, f"{inner}encoder.layers."),
        f"{inner}encoder.final_layernorm.weight": weights["model.norm.weight"],
        f"{inner}output_layer.weight": weights["lm_head.weight"],
    }


def of_megatron_pipeline(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Layers 0 and 2 are functions."""
    return {
        "1.word_embeddings.weight": weights["model.embed_tokens.weight"],
        **megatron(weights, "", first=3),
        "6.weight": weights["model.norm.weight"],
        "7.lm_head.weight": weights["lm_head.weight"],
    }


def of_pipeline(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Layers of transformers, dealt out as they are."""
    names = {
        "model.embed_tokens.weight": "0.weight",
        "model.norm.weight": "3.weight",
        "lm_head.weight": "4.weight",
    }
    return {
        names.get(name) or name.replace("model.layers.0", "1").replace("model.layers.1", "2"): value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("packed", [of_megatron, of_megatron_pipeline, of_pipeline])
def test_a_llama_gets_its_own_tensors_back(
    packed: Callable[[Mapping[str, torch.Tensor]], Tensors], tmp_path: Path
) -> None:
    config, weights = llama()
    source = make_checkpoint(tmp_path / "checkpoint", packed(weights), config=config)
    output = ckpt.to_fp32(source, tmp_path / "model", names="hf")
    assert output.verdict.startswith("loads as LlamaForCausalLM"), output.verdict
    written = load_file(output.path / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], value) for name, value in weights.items())
    assert output.checks.compared_tensors == len(weights)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w, c: c.update(num_hidden_layers=3), "blocks for 2 layers, and config.json has 3"),
        (lambda w, c: w.update({"3.adapter.weight": torch.ones(2)}), "name for 3.adapter.weight"),
        (lambda w, c: c.update(num_key_value_heads=3), "heads in 3 groups"),
        (lambda w, c: c.update(num_attention_heads=None), "num_attention_heads of config.json"),
        (lambda w, c: c.update(model_type="opt"), "no table for the model_type 'opt'"),
        (lambda w, c: c.clear(), "needs the config.json of the model"),
        (
            lambda w, c: w.update({"8.lm_head.weight": torch.ones(WORDS, SIZE)}),
            "name for 8.lm_head.weight",
        ),
    ],
)
def test_names_that_no_table_has_are_refused(
    change: Callable[[Tensors, dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    config, weights = llama()
    packed = of_megatron_pipeline(weights)
    change(packed, config)
    source = make_checkpoint(tmp_path / "checkpoint", packed, config=config or None)
    with pytest.raises(CheckpointError, match=reason) as raised:
        ckpt.to_fp32(source, tmp_path / "model", names="hf", check="names")
    assert raised.value.kind == "refused"
    assert not (tmp_path / "model").exists()


def test_names_are_those_after_rename(tmp_path: Path) -> None:
    config, weights = llama()
    wrapped = {f"net.{name}": value for name, value in of_megatron_pipeline(weights).items()}
    source = make_checkpoint(tmp_path / "checkpoint", wrapped, config=config)
    output = ckpt.to_fp32(
        source, tmp_path / "model", names="hf", rename={r"^net\.": ""}, select="model.norm.*"
    )
    assert load_file(output.path / "model.safetensors").keys() == {"model.norm.weight"}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_names_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    config, weights = llama()
    source = make_checkpoint(tmp_path / "checkpoint", of_pipeline(weights), config=config)
    renames = tmp_path / f"names{suffix}"
    pairs = {
        r"^0\.": "model.embed_tokens.",
        r"^3\.": "model.norm.",
        r"^4\.": "lm_head.",
        r"^1\.": "model.layers.0.",
        r"^2\.": "model.layers.1.",
    }
    lines = [f"'{old}' = '{new}'" for old, new in pairs.items()]
    renames.write_text("\n".join(lines) if suffix == ".toml" else json.dumps({"rename": pairs}))
    run("to-fp32", source, "--rename", renames, "-o", tmp_path / "model")
    assert load_file(tmp_path / "model/model.safetensors").keys() == weights.keys()
    ckpt.to_fp32(source, tmp_path / "again", rename=str(renames))

    renames.write_text("['a']" if suffix == ".toml" else "[1]")
    with pytest.raises(CheckpointError, match=r"expected 'regular|neither TOML"):
        ckpt.to_fp32(source, tmp_path / "third", rename=str(renames))


def test_the_models_own_names_stay(tmp_path: Path) -> None:
    config, weights = llama()
    source = make_checkpoint(tmp_path / "checkpoint", weights, config=config)
    output = ckpt.to_fp32(source, tmp_path / "model", names="hf")
    assert any("changes nothing" in note for note in output.notes)
    assert load_file(output.path / "model.safetensors").keys() == weights.keys()


def test_rows_that_pad_a_vocabulary_are_left_out_of_a_pipelines_model(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "parallel/p3dm_z1_w4", source)
    (source / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 30}))
    renames = {r"^tied_modules\.embed\.position_embeddings": "positions"}
    with pytest.raises(CheckpointError, match=r"no gpt_neox name for positions.weight"):
        ckpt.to_fp32(source, tmp_path / "model", names="hf", rename=renames)
    output = ckpt.to_fp32(source, tmp_path / "model", check="none")
    name = "tied_modules.embed.word_embeddings.weight"
    assert load_file(output.path / "model.safetensors")[name].shape == (30, 16)


def test_templates_are_read_once_and_name_real_places() -> None:
    for table in framework_tables.tables():
        for rule in table.rules:
            for template in (*rule.sources, *rule.targets):
                framework_tables._pattern(template)
