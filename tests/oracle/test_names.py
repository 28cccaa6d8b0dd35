"""Names: the output loads in its reader, or the conversion says that it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from heavy_libraries import transformers
from made_checkpoints import TAG, make_checkpoint, of_model
from oracles import FIXTURES, convert
from oracles import run as run_command
from safetensors.torch import load_file, save_file

import ckpt
from ckpt.results import WeightChecks
from ckpt.weights.check import checking, stored
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.conversion import comparison
from ckpt.weights.conversion.planning import Product
from ckpt.weights.naming import naming
from ckpt.weights.reader import installed
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.tensors import DType, Extent, TensorRef, Weights


def run(*words: Any, code: int = 0) -> None:
    """Runs a command. The table of names is what is tried here, so it alone is asked."""
    if words[0] == "to-fp32" and "--check" not in words:
        words = (*words, "--check", "names")
    run_command(*words, code=code)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


def config(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**SIZES, **changes})


@cache
def llama(cls: Any = None, **changes: Any) -> Any:
    cls = cls or transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = cls(config(**changes))
    model.config.architectures = [cls.__name__]
    return model


def parameters(model: Any, rename: Callable[[str], str] = str) -> dict[str, torch.Tensor]:
    return {rename(name): value for name, value in model.named_parameters()}


def stated(model: Any, **changes: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=True)) | changes


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text())


def loads_like(folder: Path, model: Any) -> dict[str, Any]:
    """Loads the folder, requires the model's values, and gives what loading said."""
    loaded, info = type(model).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    return info


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "forward module": lambda name: f"_forward_module.{name}",
    "torch.compile of layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".1.", ".1._fsdp_wrapped_module."),
    "checkpoint_wrapper": lambda name: name.replace(".0.", ".0._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrapper", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_taken_off_and_listed(wrapper: Callable[[str], str], tmp_path: Path) -> None:
    model = llama()
    source = make_checkpoint(tmp_path / "c", parameters(model, wrapper), config=stated(model))
    convert(source, tmp_path / "m")
    loads_like(tmp_path / "m", model)
    facts = record(tmp_path / "m")
    assert facts["loads"] is True
    assert facts["verdict"] == "loads as LlamaForCausalLM: 21 of 21 names"
    changed = {name: wrapper(name) for name in parameters(model) if wrapper(name) != name}
    assert facts["renamed"] == changed and facts["rules"]


def located(names: Iterable[str]) -> Weights:
    refs = {name: TensorRef(DType.F32, (1,), (Extent(Path("x"), 0, 4),)) for name in names}
    return Weights(refs, order=tuple(refs))


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    save_file(
        {"module.a": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    weights = located(["module.a", "module.b"])
    assert not naming.unwrapped(weights, Audience(tmp_path, None)).renamed
    some = located(["module.a", "other.b"])
    assert not naming.unwrapped(some, Audience(tmp_path / "none", None)).renamed


def test_wrapped_and_plain_names_of_one_checkpoint_stay_apart(tmp_path: Path) -> None:
    both = located(["a._orig_mod.w", "a.w"])
    assert not naming.unwrapped(both, Audience(tmp_path, None)).renamed


def test_a_value_head_is_written_as_trl_writes_it(tmp_path: Path) -> None:
    model = llama()
    held = parameters(model, lambda name: f"pretrained_model.{name}")
    held |= {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    written = convert(source, tmp_path / "m")
    assert written.keys() == {*parameters(model), "v_head.summary.weight", "v_head.summary.bias"}
    assert loads_like(tmp_path / "m", model)["unexpected_keys"] == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


def test_nothing_is_called_missing_or_not_where_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = of_model(tmp_path / "c", llama())
    run("show", source)
    assert "missing      nothing" in capsys.readouterr().out

    path = source / TAG / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"frozen_param_shapes": None}, path)  # exclude_frozen_parameters
    run("show", source)
    told = capsys.readouterr().out
    assert "frozen weights, if any, are not in it" in told
    assert "missing      nothing" not in told


def ppo(folder: Path, tie: bool = False, content: dict[str, Any] | None = None) -> Path:
    """What trl's PPO trains: a policy and a value model, whose base has a second name."""
    policy = llama(tie_word_embeddings=tie)
    value = llama(transformers.LlamaForSequenceClassification, num_labels=1)
    held = parameters(policy, lambda name: f"policy.{name}")
    held |= parameters(value, lambda name: f"value_model.{name}")
    tied = {
        f"critic_backbone.{n}": f"value_model.model.{n}" for n, _ in value.model.named_parameters()
    }
    return make_checkpoint(folder, held, tied=tied, config=content)


def test_of_two_models_in_one_the_part_is_written_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, value = llama(), llama(transformers.LlamaForSequenceClassification, num_labels=1)
    source = ppo(tmp_path / "c", content=stated(policy, id2label={"0": "value"}))
    convert(source, tmp_path / "policy", "--part", "policy")
    loads_like(tmp_path / "policy", policy)

    convert(source, tmp_path / "value", "--part", "value_model")
    assert record(tmp_path / "value")["reader"] == "LlamaForSequenceClassification"
    loads_like(tmp_path / "value", value)

    run("to-fp32", source, "-o", tmp_path / "no", "--part", "actor", code=1)
    assert "no part 'actor'; names begin with policy, value_model" in capsys.readouterr().err


def test_of_two_models_in_one_the_configuration_decides_if_it_can(tmp_path: Path) -> None:
    source = ppo(tmp_path / "c", content=stated(llama()))
    convert(source, tmp_path / "m")
    loads_like(tmp_path / "m", llama())
    assert any("only policy is written" in note for note in record(tmp_path / "m")["notes"])


def test_of_two_models_that_both_fit_none_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = parameters(llama(), lambda name: f"actor.{name}")
    held |= {name.replace("actor.", "critic."): value for name, value in held.items()}
    source = make_checkpoint(tmp_path / "c", held, config=stated(llama()))
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    error = capsys.readouterr().err
    assert "actor (21 names), critic (21 names)" in error and "--part actor" in error
    assert not (tmp_path / "m").exists()
    convert(source, tmp_path / "m", "--part", "critic")
    loads_like(tmp_path / "m", llama())


def test_roles_without_a_configuration_stay_as_they_are(tmp_path: Path) -> None:
    held = {"actor.weight": torch.ones(4, 4), "critic.weight": torch.ones(2, 2)}
    source = make_checkpoint(tmp_path / "c", held)
    assert convert(source, tmp_path / "m").keys() == held.keys()
    assert "--part writes one" in " ".join(record(tmp_path / "m")["notes"])


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "backbone.encoder.net."])
def test_one_prefix_that_makes_all_fit_is_taken_off(prefix: str, tmp_path: Path) -> None:
    source = of_model(tmp_path / "c", llama(), prefix)
    convert(source, tmp_path / "m")
    loads_like(tmp_path / "m", llama())


def test_a_base_model_alone_takes_the_prefix_that_its_class_gives_it(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    held = {n.removeprefix("model."): v for n, v in parameters(model).items()}
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    convert(source, tmp_path / "m")
    loads_like(tmp_path / "m", model)
    assert record(tmp_path / "m")["loads"] is True


def test_the_class_is_named_that_the_weights_are_of(tmp_path: Path) -> None:
    model = llama(transformers.LlamaForSequenceClassification, num_labels=1)
    content = stated(model, architectures=["LlamaForCausalLM"])
    source = make_checkpoint(tmp_path / "c", parameters(model), config=content)
    convert(source, tmp_path / "m")
    facts = record(tmp_path / "m")
    assert facts["verdict"].startswith("loads as LlamaForSequenceClassification: 21 of 21 names")
    assert any("LlamaForCausalLM, which config.json names" in note for note in facts["notes"])


def foreign(name: str) -> str:
    return name.replace("self_attn", "attention").replace("mlp", "feed_forward")


@pytest.mark.parametrize(
    ("attributes", "statement"),
    [
        (("student", "teacher"), "below student., teacher. are those of LlamaForCausalLM: --part"),
        (("llm",), "below llm. are those of LlamaForCausalLM: --part llm writes these, without"),
        (("models.0", "models.1"), "below models.0., models.1. are those of LlamaForCausalLM"),
    ],
)
def test_models_inside_of_a_wrapper_are_named_with_the_option_that_writes_one(
    attributes: tuple[str, ...],
    statement: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = llama()
    held = {"projector.weight": torch.ones(4, 4)}
    for attribute in attributes:
        held |= parameters(model, lambda name, prefix=attribute: f"{prefix}.{name}")
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    run("to-fp32", source, "-o", tmp_path / "m", "--check", "names", code=1)
    said = capsys.readouterr().err
    assert statement in said and "num_hidden_layers" not in said

    convert(source, tmp_path / "m", "--part", attributes[0])
    loads_like(tmp_path / "m", model)


def test_a_prefix_is_taken_off_a_model_that_lacks_a_few_names_of_its_class(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        architectures=["BertModel"],
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    held = parameters(model, lambda name: f"0.auto_model.{name}")
    source = make_checkpoint(tmp_path / "c", held, config=config.to_dict())
    convert(source, tmp_path / "m")
    _, loading = transformers.BertModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert set(loading["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not loading["unexpected_keys"]


def test_a_class_that_config_json_does_not_name_is_not_called_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    content = {key: value for key, value in stated(model).items() if key != "architectures"}
    source = make_checkpoint(tmp_path / "c", parameters(model, foreign), config=content)
    run("to-fp32", source, "-o", tmp_path / "m", "--check", "names", code=1)
    said = capsys.readouterr().err
    assert "a class of the model_type of config.json, which names no architecture" in said
    assert "the class of config.json" not in said


def test_names_that_do_not_fit_are_refused_and_written_as_they_are_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    source = make_checkpoint(tmp_path / "c", parameters(model, foreign), config=stated(model))
    run("to-fp32", source, "-o", tmp_path / "m", "--json", code=1)
    error = json.loads(capsys.readouterr().err)
    assert error["kind"] == "unloadable"
    for text in (
        "LlamaForCausalLM",
        "missing, such as model.layers.0.mlp.down_proj.weight",
        "has model.layers.0.attention.k_proj.weight",
        "--names as-stored",
    ):
        assert text in error["error"]
    assert not (tmp_path / "m").exists()

    written = convert(source, tmp_path / "m", "--names", "as-stored")
    assert written.keys() == parameters(model, foreign).keys()
    assert not (tmp_path / "m/config.json").exists()
    assert any("config.json is left out" in note for note in record(tmp_path / "m")["notes"])


def test_names_are_stripped_renamed_and_selected(tmp_path: Path) -> None:
    model = llama()
    held = parameters(model, lambda name: "net." + foreign(name))
    held["extra.head.weight"] = torch.ones(2, 2)
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    wishes = ("--strip", "net.", "--rename", r"\.attention\.=.self_attn.")
    wishes += ("--rename", "feed_forward=mlp", "--select", "model.*", "--select", "lm_head.*")
    convert(source, tmp_path / "m", *wishes)
    loads_like(tmp_path / "m", model)
    assert record(tmp_path / "m")["renamed"]["lm_head.weight"] == "net.lm_head.weight"

    pairs = [(r"\.attention\.", ".self_attn."), ("feed_forward", "mlp")]
    with ckpt.open(source, strip="net.", rename=pairs, select=["model.*", "lm_head.*"]) as opened:
        assert set(opened) == set(parameters(model))
        assert torch.equal(opened["lm_head.weight"], held["net.lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--strip", "nothing."), "no name begins with 'nothing.'"),
        (("--rename", "nothing=x"), "'nothing' matches no name"),
        (("--rename", r"lm=\9"), "cannot replace 'lm'"),
        (("--rename", r"l+m=\9"), "cannot replace 'l+m'"),
        (("--rename", r"^lm\.weight$=__metadata__"), "safetensors keeps for itself"),
        (("--rename", r"^lm\.weight$="), "the new name of lm.weight is empty"),
        (("--rename", r"^lm=l\0m"), "cannot be written"),
        (("--rename", "^lm=\ud800"), "cannot be written"),
        (("--strip", ""), "the prefix to strip is empty"),
        (("--rename", "^.*$=x"), "would both be named x"),
        (("--select", "nothing.*"), "no name matches 'nothing.*'"),
    ],
)
def test_wishes_that_nothing_fulfils_are_errors(
    options: tuple[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(tmp_path / "c", {"lm.weight": torch.ones(2), "b": torch.ones(2)})
    run("to-fp32", source, "-o", tmp_path / "m", *options, code=1)
    assert text in capsys.readouterr().err


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    held, content = parameters(llama()), stated(llama())
    cases = {
        "no config.json, so no reader is known": None,
        "custom code (auto_map) is not run": content | {"auto_map": {"AutoModel": "m.M"}},
        "MyForCausalLM is not in the table": content | {"architectures": ["MyForCausalLM"]},
        "config.json names no architecture": {"hidden_size": 8},
    }
    for number, (text, config) in enumerate(cases.items()):
        source = make_checkpoint(tmp_path / f"c{number}", held, config=config)
        convert(source, tmp_path / f"m{number}")
        assert text in record(tmp_path / f"m{number}")["verdict"]
        assert record(tmp_path / f"m{number}")["loads"] is None


@pytest.mark.parametrize("check", ["names", "transformers"])
def test_layers_that_config_json_counts_and_the_checkpoint_lacks(
    check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(tmp_path, llama(), "--check", check, code=1, num_hidden_layers=3)
    error = capsys.readouterr().err
    assert "9 of its 30 names are missing, such as model.layers.2." in error
    assert ("--check transformers asks" in error) == (check == "names")
    if check == "names":
        assert "config.json says num_hidden_layers 3, and the checkpoint has layers 0 to 1" in error
        checked(tmp_path / "d", llama(), code=1, num_hidden_layers=900)
        assert "names are missing" in capsys.readouterr().err


def test_a_small_part_that_the_checkpoint_lacks_is_a_note(tmp_path: Path) -> None:
    held = dict(parameters(llama()))
    del held["model.layers.1.mlp.down_proj.weight"]
    source = make_checkpoint(tmp_path / "c", held, config=stated(llama()))
    convert(source, tmp_path / "m")
    facts = record(tmp_path / "m")
    assert facts["loads"] is False
    assert facts["verdict"] == "loads as LlamaForCausalLM in part: 20 of 21 names"
    assert any(
        "would initialize model.layers.1.mlp.down_proj.weight" in note for note in facts["notes"]
    )


def test_a_newer_transformers_excuses_no_layers(tmp_path: Path) -> None:
    newer = {"transformers_version": "77.1.0", "num_hidden_layers": 3}
    checked(tmp_path, llama(), code=1, **newer)


def test_a_newer_transformers_than_the_tables_is_not_accused(tmp_path: Path) -> None:
    model = llama()
    content = stated(model) | {"transformers_version": "77.1.0"}
    for renamed, code in ((lambda n: n.replace(".mlp.", ".feed_forward."), 0), (foreign, 1)):
        source = make_checkpoint(tmp_path / f"c{code}", parameters(model, renamed), config=content)
        run("to-fp32", source, "-o", tmp_path / "m", code=code)
    facts = record(tmp_path / "m")
    assert "newer transformers (77.1.0)" in facts["verdict"] and facts["loads"] is None


def test_a_stale_file_of_16_bit_weights_makes_nothing_fail(tmp_path: Path) -> None:
    source = of_model(tmp_path / "c", llama())
    save_file({"other.weight": torch.ones(3)}, source / "model.safetensors")
    convert(source, tmp_path / "m")
    assert record(tmp_path / "m")["loads"] is True


def test_the_names_of_the_16_bit_file_are_a_reader_too(tmp_path: Path) -> None:
    held = {"net.a": torch.ones(2, 2), "net.b": torch.ones(2)}
    source = make_checkpoint(tmp_path / "c", {f"wrapped.{n}": v for n, v in held.items()})
    save_file({n: v.bfloat16() for n, v in held.items()}, source / "model.safetensors")
    assert convert(source, tmp_path / "m").keys() == held.keys()
    assert record(tmp_path / "m")["verdict"] == "has the names of model.safetensors: 2 names"


def test_the_names_that_only_transformers_5_uses_are_said(tmp_path: Path) -> None:
    cls = transformers.MixtralForCausalLM
    model = cls(transformers.MixtralConfig(**SIZES, num_local_experts=3))
    source = of_model(tmp_path / "c", model)
    convert(source, tmp_path / "m", "--layout", "runtime")
    loads_like(tmp_path / "m", model)
    verdict = record(tmp_path / "m")["verdict"]
    assert verdict.startswith("loads as MixtralForCausalLM: 21 of 21 names; these are the names")
    assert "transformers 4, vLLM, llama.cpp use others (6 of 21)" in verdict


def test_rows_unlike_the_vocabulary_are_said(tmp_path: Path) -> None:
    source = of_model(tmp_path / "c", llama())
    content = json.loads((source / "config.json").read_text()) | {"vocab_size": 60}
    (source / "config.json").write_text(json.dumps(content))
    convert(source, tmp_path / "m")
    facts = record(tmp_path / "m")
    assert any("64 rows, and config.json says vocab_size 60" in note for note in facts["notes"])
    assert facts["loads"] is False
    needed = 'but from_pretrained fails until config.json has "vocab_size": 64'
    assert facts["verdict"] == f"LlamaForCausalLM: 21 of 21 names, {needed}"


def test_labels_unlike_the_configuration_are_said(tmp_path: Path) -> None:
    model = llama(transformers.LlamaForSequenceClassification, num_labels=1)
    content = stated(model, id2label={"0": "a", "1": "b", "2": "c"})
    convert(make_checkpoint(tmp_path / "c", parameters(model), config=content), tmp_path / "m")
    notes = record(tmp_path / "m")["notes"]
    assert any("score.weight has 1 row, and config.json says 3 labels" in note for note in notes)
    assert any('write "num_labels": 1 in place of id2label and label2id' in note for note in notes)

    path = tmp_path / "m/config.json"
    mended = {
        n: v for n, v in json.loads(path.read_text()).items() if n not in ("id2label", "label2id")
    }
    path.write_text(json.dumps(mended | {"num_labels": 1}))
    loads_like(tmp_path / "m", model)
    source, output = tmp_path / "c", tmp_path / "other"
    convert(source, output, "--config", path)
    assert record(output)["verdict"] == "loads as LlamaForSequenceClassification: 21 of 21 names"


def test_weights_that_only_the_configuration_ties_are_said_and_untied(tmp_path: Path) -> None:
    model = llama()
    source = make_checkpoint(
        tmp_path / "c", parameters(model), config=stated(model, tie_word_embeddings=True)
    )
    convert(source, tmp_path / "m")
    assert any("--untie" in note for note in record(tmp_path / "m")["notes"])

    convert(source, tmp_path / "u", "--untie")
    assert json.loads((tmp_path / "u/config.json").read_text())["tie_word_embeddings"] is False
    assert not any("--untie" in note for note in record(tmp_path / "u")["notes"])
    loads_like(tmp_path / "u", model)

    tied = of_model(tmp_path / "t", llama(tie_word_embeddings=True))
    convert(tied, tmp_path / "v")
    assert not any("--untie" in note for note in record(tmp_path / "v")["notes"])


def test_the_installed_transformers_is_asked(tmp_path: Path) -> None:
    source = of_model(tmp_path / "c", llama())
    convert(source, tmp_path / "m", "--check", "transformers")
    line = f"of transformers {transformers.__version__}: 21 of 21 names and shapes"
    assert line in record(tmp_path / "m")["verdict"]


def test_what_the_installed_transformers_answers_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = of_model(tmp_path / "c", llama())
    shapes = {name: list(value.shape) for name, value in parameters(llama()).items()}
    answer: dict[str, Any] = {"version": "5", "class": "X", "tied": [], "missing": []}
    answer |= {"unexpected": [], "hub": {}}

    def refusal(memory: dict[str, list[int]]) -> str:
        monkeypatch.setattr(installed, "ask", lambda *_: answer | {"memory": memory, "hub": memory})
        run("to-fp32", source, "-o", tmp_path / "m", "--check", "transformers", code=1)
        return capsys.readouterr().err

    assert "other shapes of lm_head.weight" in refusal(shapes | {"lm_head.weight": [60, 16]})
    heads = {f"head{number}.b": [3] for number in range(30)}
    assert "30 of its 51 names are missing, such as head0.b" in refusal(shapes | heads)


def test_transformers_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        'print(\'{"lacks": "torch"}\')': "torch is not installed",
        "raise ValueError('no such model')": "cannot build the model of config.json: ValueError",
        "import time; time.sleep(60)": "did not build the model in 1 s",
    }
    monkeypatch.setattr(installed, "TIMEOUT_SECONDS", 1)
    for code, text in answers.items():
        monkeypatch.setattr(installed, "_CHILD", code)
        with pytest.raises(CheckpointError, match=text):
            installed.ask({"model_type": "llama"})


def test_tensors_that_the_16_bit_file_lacks_are_not_called_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under stage 3 the only copies are those in model.safetensors."""
    source = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "trainer-zero3/checkpoint-2", source)
    file = source / "model.safetensors"
    held = load_file(file)
    layers = {name: value for name, value in held.items() if ".mlp." not in name}

    save_file(layers, file)
    run("to-fp32", source, "-o", tmp_path / "m")
    told = capsys.readouterr().out
    assert f"{len(layers)} of {len(held)} tensors (" in told
    assert f"; not verified: {len(held) - len(layers)} tensors have another layout there" in told
    checks = record(tmp_path / "m")["checks"]
    assert set(checks["uncompared_tensors"]) == held.keys() - layers.keys()

    save_file({f"other.{name}": value for name, value in layers.items()}, file)
    run("to-fp32", source, "-o", tmp_path / "n")
    nothing = "model.safetensors has none of these tensors under the same name and shape"
    assert nothing in capsys.readouterr().out


def test_what_was_compared_is_counted() -> None:
    checks = {
        "compared_with": "model.safetensors",
        "compared_tensors": 9,
        "compared_bytes": 12,
        "source_bytes": 100,
        "uncompared_tensors": list("abcdef"),
        "uncompared_buffers": 0,
        "unlike_tensors": [],
    }
    equal, open_points = comparison.words(WeightChecks(verified=True, **checks))
    assert equal == "9 of 15 tensors (12 % of bytes) equal to model.safetensors"
    assert open_points == ["6 tensors have another layout there"]


def test_an_adapter_without_elements_is_not_published(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: torch.ones(0)}, path)
    with pytest.raises(CheckpointError, match="without elements") as error:
        stored.require_adapter(path, safetensors.read(path).tensors)
    assert error.value.kind == "unloadable"
    save_file({name: torch.ones(2, 2)}, path)
    stored.require_adapter(path, safetensors.read(path).tensors)


def test_weights_that_would_not_load_are_not_published(tmp_path: Path) -> None:
    model = llama()
    (tmp_path / "config.json").write_text(json.dumps(stated(model)))
    save_file(dict(parameters(model, lambda n: f"_orig_mod.{n}")), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="would not load these weights"):
        stored.require_model(tmp_path, safetensors.read(tmp_path).tensors)
    save_file(dict(parameters(model)), tmp_path / "model.safetensors")
    verdict = stored.require_model(tmp_path, safetensors.read(tmp_path).tensors)
    assert verdict.loads is True
    assert load_file(tmp_path / "model.safetensors").keys() == parameters(model).keys()


def checked(folder: Path, model: Any, *options: object, code: int = 0, **changes: Any) -> str:
    """Converts a model's checkpoint with a changed config.json; what is said of it."""
    source = of_model(folder / "c", model)
    content = stated(model) | changes
    (source / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != ""}))
    run("to-fp32", source, "-o", folder / "m", *options, code=code)
    if code:
        return ""
    facts = record(folder / "m")
    return " | ".join([str(facts["loads"]), facts["verdict"], *facts["notes"]])


def bert_of_shared_layers() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sizes |= {"vocab_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 16}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    for number in (1, 2):
        model.bert.encoder.layer[number] = model.bert.encoder.layer[0]
    return model


def llama_of_shared_layers() -> Any:
    model = transformers.LlamaForCausalLM(config(tie_word_embeddings=True))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


@pytest.mark.parametrize("make", [bert_of_shared_layers, llama_of_shared_layers])
def test_only_what_the_class_ties_is_left_out(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    said = checked(tmp_path, model)
    loads_like(tmp_path / "m", model)
    assert said.startswith("True")
    assert "lm_head.weight" not in load_file(tmp_path / "m/model.safetensors")


def test_the_verdict_counts_the_names_that_are_written(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(config(tie_word_embeddings=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    said = checked(tmp_path, model, "--tied", "drop")
    assert said.startswith("False | loads as LlamaForCausalLM in part: 20 of 21 names")
    assert "would initialize lm_head.weight" in said


def test_the_default_of_the_class_decides_where_ties_are_not_stated(tmp_path: Path) -> None:
    assert "ties" not in checked(tmp_path, llama(), tie_word_embeddings="")


def test_layers_that_config_json_does_not_count_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(num_hidden_layers=3)
    checked(tmp_path, model, code=1, num_hidden_layers=1)
    error = capsys.readouterr().err
    assert "18 trained tensors would not be read" in error
    assert "config.json says num_hidden_layers 1, and the checkpoint has layers 0 to 2" in error


def test_a_few_unread_tensors_are_counted(tmp_path: Path) -> None:
    held = parameters(llama()) | {"extra.bias": torch.ones(2)}
    source = make_checkpoint(tmp_path / "c", held, config=stated(llama()))
    convert(source, tmp_path / "m")
    assert record(tmp_path / "m")["verdict"].endswith("21 of 21 names; 1 tensor is not read")


@pytest.mark.parametrize(
    ("count", "text"), [(10**9, "with which no"), (-1, "num_hidden_layers -1")]
)
def test_numbers_of_layers_that_cannot_be(
    count: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(tmp_path, llama(), code=1, num_hidden_layers=count)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("version", ["5.23.0", "77.1.0"])
def test_a_file_beside_or_a_newer_version_excuses_no_other_model(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = parameters(llama(), lambda name: f"encoder.{name}") | {"head.weight": torch.ones(2, 2)}
    content = stated(llama()) | {"transformers_version": version}
    source = make_checkpoint(tmp_path / "c", held, config=content)
    save_file({n: v.detach().bfloat16() for n, v in held.items()}, source / "model.safetensors")
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    assert "21 of its 21 names are missing" in capsys.readouterr().err


def test_fields_that_switch_names_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked(tmp_path, llama(mlp_bias=True, attention_bias=True), code=1, mlp_bias=False)
    error = capsys.readouterr().err
    assert "6 trained tensors would not be read" in error
    assert "config.json says mlp_bias false" in error


def test_fields_that_switch_names_on(tmp_path: Path) -> None:
    said = checked(tmp_path, llama(), attention_bias=True)
    assert said.startswith("False") and "config.json says attention_bias true" in said
    assert "model.layers.0.self_attn.k_proj.bias" in said and "*" not in said


def test_names_without_the_base_models_prefix_are_compared_with_the_fields(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    model = transformers.OPTModel(transformers.OPTConfig(**sizes))
    said = checked(tmp_path, model, architectures=["OPTForCausalLM"])
    assert said.startswith("True | loads as OPTForCausalLM: 36 of 36 names") and "lack" not in said


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"hidden_size": 32}, "hidden_size 32"), ({"intermediate_size": 48}, "intermediate_size 48")],
)
def test_sizes_unlike_the_configuration(
    changes: dict[str, int], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(tmp_path, llama(), code=1, **changes)
    assert f"config.json says {text}" in capsys.readouterr().err


@pytest.mark.parametrize("check", ["names", "transformers"])
@pytest.mark.parametrize(
    ("names", "line"),
    [
        (lambda name: name.removeprefix("model."), "20 of 21 names"),
        (lambda name: name.replace("model.", "model.model.", 1), "21 of 21 names"),
    ],
)
def test_the_prefix_that_from_pretrained_adds_or_takes_off_itself(
    names: Callable[[str], str], line: str, check: str, tmp_path: Path
) -> None:
    held = parameters(llama(), names)
    held.pop("lm_head.weight", None)
    if line.startswith("21"):
        held |= {"lm_head.weight": llama().lm_head.weight, "head.bias": torch.ones(2)}
    source = make_checkpoint(tmp_path / "c", held, config=stated(llama()))
    run("to-fp32", source, "-o", tmp_path / "m", "--check", check)
    facts = record(tmp_path / "m")
    said = " ".join([facts["verdict"], *facts["notes"]])
    assert line in said or "LlamaForCausalLM, which config.json names, would lack lm_head" in said
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype=torch.float32
    )
    assert len(info["missing_keys"]) == 21 - int(line[:2])


def test_modules_without_modules_json_keep_all_their_names(tmp_path: Path) -> None:
    held = {"0.model.a": torch.ones(2), "2.linear.weight": torch.ones(2, 2)}
    source = make_checkpoint(tmp_path / "c", held)
    assert convert(source, tmp_path / "m").keys() == held.keys()
    assert any("are not divided" in note for note in record(tmp_path / "m")["notes"])


def test_transformers_is_asked_for_the_class_that_the_names_are_of(tmp_path: Path) -> None:
    model = llama(transformers.LlamaForSequenceClassification, num_labels=1)
    said = checked(tmp_path, model, "--check", "transformers", architectures="")
    assert "loads as LlamaForSequenceClassification of transformers" in said


@pytest.mark.parametrize("check", ["names", "transformers"])
def test_a_selection_of_which_nothing_is_read_is_written_only_as_it_is_stored(
    check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    held = parameters(model) | {f"teacher.{n}": p for n, p in parameters(model).items()}
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    wishes = ("--select", "teacher.*")
    run("to-fp32", source, "-o", tmp_path / "m", *wishes, "--check", check, code=1)
    said = capsys.readouterr().err
    assert "LlamaForCausalLM, the class of config.json, reads none of the 21 names" in said
    assert not (tmp_path / "m").exists()

    run("to-fp32", source, "-o", tmp_path / "m", *wishes, "--names", "as-stored")
    written = load_file(tmp_path / "m/model.safetensors")
    assert set(written) == {name for name in held if name.startswith("teacher.")}
    assert not (tmp_path / "m/config.json").exists()


def test_a_value_head_alone_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    held = parameters(model) | {"v_head.summary.weight": torch.ones(1, 32)}
    source = make_checkpoint(tmp_path / "c", held, config=stated(model))
    run("to-fp32", source, "-o", tmp_path / "m", "--select", "v_head.*", code=1)
    assert "reads none of the 1 name that --select leaves" in capsys.readouterr().err


def test_the_installed_transformers_is_asked_only_for_what_is_selected(tmp_path: Path) -> None:
    wishes = ("--check", "transformers", "--select", "model.norm.weight")
    assert "1 of 21 names" in checked(tmp_path, llama(), *wishes)


QKV = {"q_proj": 16, "k_proj": 8, "v_proj": 8}  # rows of each


def phi3() -> Any:
    sizes = {**SIZES, "pad_token_id": 0, "architectures": ["Phi3ForCausalLM"]}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))


def with_joined(folder: Path, model: Any, wrapper: str, join: Callable[..., torch.Tensor]) -> Path:
    """A checkpoint whose parameters are q, k and v, which a hook of the state dict joined."""
    held: dict[str, torch.Tensor] = {}
    for name, value in parameters(model, lambda name: wrapper + name).items():
        if "qkv_proj" in name:
            parts = zip(QKV, value.split([*QKV.values()]), strict=True)
            held |= {name.replace("qkv_proj", part): rows for part, rows in parts}
        else:
            held[name] = value
    source = make_checkpoint(folder, held, config=stated(model))

    path = source / TAG / "mp_rank_00_model_states.pt"
    root = torch.load(path, weights_only=False)
    module = root["module"]
    for name in [name for name in module if "q_proj" in name]:
        rows = [module.pop(name.replace("q_proj", part)) for part in QKV]
        module[name.replace("q_proj", "qkv_proj")] = join(rows)
    torch.save(root, path)
    return source


@pytest.mark.parametrize("wrapper", ["", "student."])
@pytest.mark.parametrize("make", [llama, phi3])
def test_what_a_hook_joined_is_written_once_as_the_reader_wants_it(
    make: Callable[[], Any], wrapper: str, tmp_path: Path
) -> None:
    model = make()
    source = with_joined(tmp_path / "c", model, wrapper, torch.cat)
    convert(source, tmp_path / "m")
    assert not loads_like(tmp_path / "m", model)["unexpected_keys"]
    facts = record(tmp_path / "m")
    assert facts["loads"] is True and not facts["checks"]["uncompared_tensors"]
    assert any(note.startswith("left out: ") and "qkv_proj" in note for note in facts["notes"])

    written = convert(source, tmp_path / "all", "--names", "as-stored")
    name = next(name for name in written if "qkv_proj" in name)
    parts = [written[name.replace("qkv_proj", part)] for part in QKV]
    assert torch.equal(written[name], torch.cat(parts))


def test_what_a_hook_joined_in_another_order_is_an_error_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_joined(tmp_path / "c", llama(), "", lambda rows: torch.cat(rows).flip(0))
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    error = capsys.readouterr().err
    assert "2 tensors would not be read" in error and "--check none writes them" in error
    convert(source, tmp_path / "m", "--check", "none")
    assert len(loads_like(tmp_path / "m", llama())["unexpected_keys"]) == 2


def verdict_without(names: Iterable[str]) -> Any:
    """What is said of a Llama with which no file holds some of the values."""
    model, gone = llama(), dict.fromkeys(names, "kept elsewhere")
    refs = located(parameters(model)).tensors
    weights = Weights({n: r for n, r in refs.items() if n not in gone}, absent=gone)
    return checking._by_names(
        Product("model", weights, Surroundings()), Audience(Path("x"), stated(model)), Request()
    )


def test_names_without_values_are_none_of_the_output() -> None:
    verdict = verdict_without(["model.norm.weight", "extra"])
    assert verdict.loads is False and verdict.missing == ("model.norm.weight",)
    assert (
        verdict.line == "loads as LlamaForCausalLM in part: 20 of 21 names"
        and not verdict.unexpected
    )
    assert any("(kept elsewhere)" in note for note in verdict.notes)
    with pytest.raises(CheckpointError, match=r"20 of its 21 names are missing.*kept elsewhere"):
        verdict_without([name for name in parameters(llama()) if name != "model.norm.weight"])


@pytest.mark.parametrize("check", ["names", "transformers"])
def test_a_head_that_is_not_there_is_an_error_whose_advice_works(
    check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama(transformers.LlamaModel)
    held = parameters(base, lambda name: f"model.{name}") | {"value_head.weight": torch.ones(1, 16)}
    content = stated(base, architectures=["LlamaForCausalLM"])
    source = make_checkpoint(tmp_path / "c", held, config=content)
    run("to-fp32", source, "-o", tmp_path / "m", "--check", check, code=1)
    error = capsys.readouterr().err
    assert "would initialize lm_head.weight at random" in error
    assert "these are the weights of LlamaModel, with value_head.weight beside" in error

    copy = tmp_path / "config.json"
    copy.write_text(json.dumps(content | {"architectures": ["LlamaModel"]}))
    run("to-fp32", source, "-o", tmp_path / "m", "--check", check, "--config", copy)
    assert record(tmp_path / "m")["verdict"].endswith("; 1 tensor is not read") or check != "names"
    assert loads_like(tmp_path / "m", base)["unexpected_keys"] == {"value_head.weight"}


@pytest.mark.parametrize("check", ["names", "transformers"])
def test_a_base_model_under_the_name_of_a_model_with_a_head_is_called_so(
    check: str, tmp_path: Path
) -> None:
    base = llama(transformers.LlamaModel)
    held = parameters(base, lambda name: f"model.{name}")
    content = stated(base, architectures=["LlamaForCausalLM"])
    source = make_checkpoint(tmp_path / "c", held, config=content)
    run("to-fp32", source, "-o", tmp_path / "m", "--check", check)
    facts = record(tmp_path / "m")
    assert facts["verdict"].startswith("loads as LlamaModel") and "20 of 20" in facts["verdict"]
    assert any("LlamaForCausalLM, which config.json names, would lack" in n for n in facts["notes"])
    loads_like(tmp_path / "m", base)


def test_embeddings_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    held = parameters(llama())
    del held["model.embed_tokens.weight"]
    source = make_checkpoint(tmp_path / "c", held, config=stated(llama()))
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    run("to-fp32", source, "-o", tmp_path / "m", "--names", "as-stored")
