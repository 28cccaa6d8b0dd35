"""The table of names is what the installed transformers builds; what it says of a model is so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from heavy_libraries import LateModule, transformers
from oracles import ROOT

from ckpt.weights.reader import lengths, table
from ckpt.weights.reader.fitting import Fitting, TooManyNames
from converters.tensors import Weights

sys.path.insert(0, str(ROOT / "scripts/tables"))

architecture_builds = LateModule("architecture_builds")
try_architectures = LateModule("try_architectures")
try_configurations = LateModule("try_configurations")

# Configurations that the table was not made from: other lengths, other kinds of layers.
SAMPLE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_hidden_layers": 5, "attention_bias": True},
    "MixtralForCausalLM": {"num_hidden_layers": 2, "num_local_experts": 3},
    "Qwen2ForCausalLM": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {"num_hidden_layers": 4, "mlp_only_layers": [1], "num_experts": 5},
    "DeepseekV3ForCausalLM": {
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "n_routed_experts": 8,
        "q_lora_rank": None,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config.num_hidden_layers": 7,
        "vision_config.num_hidden_layers": 3,
    },
    "Qwen2_5_VLForConditionalGeneration": {"vision_config.depth": 3},
    "LlavaForConditionalGeneration": {"text_config.num_hidden_layers": 3},
    "BertForMaskedLM": {"num_hidden_layers": 3},
    "GPT2LMHeadModel": {"n_layer": 3, "add_cross_attention": True},
    "T5ForConditionalGeneration": {"num_layers": 3, "num_decoder_layers": 2},
    "WhisperForConditionalGeneration": {"encoder_layers": 3, "decoder_layers": 2},
    "ViTForImageClassification": {"num_hidden_layers": 3},
    "GPTNeoXForCausalLM": {"num_hidden_layers": 3, "attention_bias": False},
    "JambaForCausalLM": {"num_hidden_layers": 8, "num_experts": 4},
}


@pytest.mark.parametrize(("name", "settings"), SAMPLE.items(), ids=SAMPLE)
def test_the_table_has_the_names_that_transformers_builds(
    name: str, settings: dict[str, Any]
) -> None:
    reader = table.reader_of(name)
    assert reader is not None
    made = architecture_builds.build(getattr(transformers, name), settings)
    config = made.model.config.to_dict()
    for names, tree in ((made.memory, reader.memory), (made.hub, reader.hub)):
        fit = reader.fit_of(tree, names, config)
        assert (fit.missing, fit.unexpected) == ([], [])
        assert fit.present == len(names)

    weights = [n for n in made.memory if n.endswith("weight") and n not in made.tied]
    for lost in (weights[0], weights[len(weights) // 2]):
        fit = reader.fit_of(reader.memory, [n for n in made.memory if n != lost], config)
        assert fit.missing == [lost]


LISTS = {
    "*": ({}, None, None),
    "*=3": ({}, None, 3),
    "*layers=12": ({"layers": 5}, None, 5),
    "*text.layers=12": ({"text": {}}, None, 12),
    "*layers-1=4": ({"layers": 3}, None, 2),
    "*decoder|layers=6": ({"layers": 2}, None, 2),
    "*decoder|layers=7": ({"layers": 2, "decoder": 4}, None, 4),
    "*#depths": ({"depths": [2, 2]}, None, 2),
    "*#depths-1": ({"depths": [2, 2]}, None, 1),
    "*#other": ({"depths": [2, 2]}, None, None),
    "*depths.*": ({"depths": [3, 5, 7]}, 1, 5),
    "*other.*": ({}, 1, None),
    "*layers=1": ({"layers": 10**9}, None, None),
    "*#layers": ({"layers": 7}, None, None),
}


@pytest.mark.parametrize(("key", "case"), LISTS.items(), ids=LISTS)
def test_how_long_a_list_is(key: str, case: tuple[dict[str, Any], int | None, int | None]) -> None:
    config, number, expected = case
    law = lengths.parse(key)
    assert (law and law.of(config, number)) == expected
    if law is not None:
        assert (law.doubted(config, number) is not None) == (
            expected is None and "layers" in config
        )
        assert law.sentence(config, number)


# Of each kind of length and of switched names one; scripts/tables/try_configurations.py tries all
# classes.
VARIED = (
    *("T5ForConditionalGeneration", "StableLmForCausalLM", "OPTForCausalLM"),
    *("Mistral3ForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("Swinv2ForImageClassification", "SegformerForImageClassification", "Wav2Vec2ForCTC"),
    *("DeepseekV2ForCausalLM", "FalconForCausalLM"),
)


@pytest.mark.parametrize("name", VARIED)
def test_what_is_said_of_a_varied_configuration_is_so(name: str) -> None:
    lines = list(try_configurations.tried(getattr(transformers, name)))
    assert len(lines) > 3
    assert [line for line in lines if line[1] not in ("right", "fewer names")] == []


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("T5ForConditionalGeneration", "decoder.block."),
        ("Swinv2ForImageClassification", "swinv2.encoder.layers.1."),
        ("LlavaForConditionalGeneration", "model.vision_tower.encoder.layers."),
    ],
)
def test_a_part_without_its_layers_is_refused(name: str, lost: str) -> None:
    cls = getattr(transformers, name)
    configuration = try_architectures.tiny_configuration(cls)
    whole = try_configurations.model(cls, configuration.to_dict())
    left = {n: ref for n, ref in whole.weights.tensors.items() if not n.startswith(lost)}
    word, *_, text = try_configurations.said(Weights(left), whole.config)
    assert word == "refused" and lost.rstrip(".").rpartition(".")[0] in text, text
    assert "--check transformers" in text and ("config.json says" in text or "has a list" in text)


def test_the_table_names_its_version_and_most_classes() -> None:
    assert table.version() == transformers.__version__
    content = table.TABLE.stat().st_size
    assert 200_000 < content < 600_000
    assert len({n for t in table._table()["types"].values() for n in t}) > 1_300


def test_a_configuration_that_claims_any_number_of_layers_costs_little() -> None:
    reader = table.reader_of("MixtralForCausalLM")
    assert reader is not None
    config = {"num_hidden_layers": 10_000, "num_local_experts": 10_000}
    with pytest.raises(TooManyNames):
        reader.fit_of(reader.hub, [], config)
    beyond = {"num_hidden_layers": 10**9, "num_local_experts": -1}
    fit = reader.fit_of(reader.hub, ["model.layers.4294967296.x", "a" + ".b" * 100_000], beyond)
    assert len(fit.unexpected) == 2


def test_odd_names_and_numbers_are_only_names() -> None:
    nodes = [{"w": 0}, {"*n=2": [4], "b": 1}]
    fitting_ = Fitting(nodes, {"n": 2}, ties=False)
    fit = fitting_.fit(5, ["0.w", "1.w", "²", "", "..", "0", "1.w.x"])
    assert fit.present >= 1 and fit.unexpected
    assert lengths.look_up({"a": [1]}, "a.b") is None


@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "BertModel", "LlavaForConditionalGeneration"]
)
def test_a_converted_model_loads_as_was_said(name: str, tmp_path: Path) -> None:
    word, line = try_architectures.tried(name, getattr(transformers, name), tmp_path)
    assert word == "right", line


def test_the_tables_are_in_the_package() -> None:
    root = ROOT
    project = (root / "pyproject.toml").read_text()
    patterns = re.findall(r'"ckpt\.weights" = \["([^"]+)"\]', project)
    data = {p.name for p in (root / "ckpt/weights").iterdir() if p.suffix not in (".py", "")}
    assert data == {p.name for p in (root / "ckpt/weights").glob(patterns[0])} != set()
