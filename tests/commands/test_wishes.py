"""What users wish for names and files: what is refused, what is bounded, what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import make_checkpoint
from oracles import convert, run
from test_names import WRAPPED, llama, loads_like, parameters, stated

import ckpt
from ckpt.cli import conversion as reports
from ckpt.results import WeightChecks
from ckpt.weights import request
from ckpt.weights.conversion import comparison
from ckpt.weights.conversion import convert as convert_module
from ckpt.weights.reader import installed
from converters.errors import CheckpointError
from converters.names import selection, substitution


def test_an_expression_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substitution, "SECONDS", 0.5)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(9)]
    with pytest.raises(CheckpointError, match=r"takes over 0\.5 seconds on 9 names"):
        selection.new_names(names, (), [(r"(\w+\.?)+!", "x")])
    monkeypatch.undo()
    changed = selection.new_names(names, (), [(r"layers\.(\d+)\.", r"h.\1.")])
    assert changed[names[8]] == "model.h.8.self_attn.q_proj.weight"


def test_a_tensor_that_a_header_cannot_name_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "c", {"__metadata__": torch.ones(2, 2)})
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    assert not (tmp_path / "m").exists()
    run("to-fp32", source, "-o", tmp_path / "m", "--format", "bin")


def test_config_json_is_read_as_python_writes_it(tmp_path: Path) -> None:
    changes = {"lone": "\ud800", "most": float("inf"), "least": float("-inf"), "none": float("nan")}
    source = make_checkpoint(
        tmp_path / "c", parameters(llama()), config=stated(llama(), **changes, umlaut="ä")
    )
    convert(source, tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert {key: repr(written[key]) for key in changes} == {k: repr(v) for k, v in changes.items()}
    loads_like(tmp_path / "m", llama())


def test_a_file_that_cannot_be_copied_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(tmp_path / "c", parameters(llama()), config=stated(llama()))
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("r.json"))
    run("to-fp32", source, "-o", tmp_path / "m", code=1)
    assert "tokenizer.json cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("name", ["config", "tokenizer", "base", "adapter_config", "untie"])
@pytest.mark.parametrize("format", ["lightning", "safetensors"])
def test_options_that_would_be_ignored_are_refused(name: str, format: Any, tmp_path: Path) -> None:
    held = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}
    source = make_checkpoint(tmp_path / "c", held, tied={"c.weight": "a.weight"})
    options: dict[str, Any] = {name: tmp_path}
    if format == "safetensors":
        options["naming"] = request.Naming(as_stored=True)
    if format == "lightning" or name not in ("config", "tokenizer"):
        with pytest.raises(CheckpointError, match=f"{name}=(True)? does not go with"):
            convert_module.prepare(source, format=format, request=request.Request(**options))
    stored = format != "lightning"
    for wish in ({"strip": ("a.",)}, {"select": ("a*",)}, {"part": "a"}, {"rename": (("a", "b"),)}):
        if stored and "select" in wish:  # it changes no name
            continue
        wishes = request.Request(request.Naming(as_stored=stored, **wish))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="does not go with"):
            convert_module.prepare(source, format=format, request=wishes)
    if format == "lightning":
        with pytest.raises(CheckpointError, match='tied="drop" does not go with'):
            convert_module.prepare(source, format=format, tied="drop")
        with pytest.raises(CheckpointError, match='check="transformers" does not go with'):
            convert_module.prepare(
                source, format=format, request=request.Request(check="transformers")
            )


@pytest.mark.parametrize(
    ("wrapper", "wishes"),
    [
        ("torch.compile", {"strip": "_orig_mod."}),
        ("torch.compile of layers", {"rename": {r"_orig_mod\.": ""}}),
    ],
)
def test_open_takes_the_wrapper_off_as_the_docs_say(
    wrapper: str, wishes: dict[str, Any], tmp_path: Path
) -> None:
    model = llama()
    source = make_checkpoint(tmp_path / "c", parameters(model, WRAPPED[wrapper]))
    with ckpt.open(source, **wishes) as weights:
        loaded, info = type(model).from_pretrained(
            None, config=model.config, state_dict=weights, output_loading_info=True
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_wishes_of_functions_are_pairs_or_old_new(tmp_path: Path) -> None:
    held = {"actor.weight": torch.ones(4, 4), "critic.weight": torch.zeros(2, 2)}
    source = make_checkpoint(tmp_path / "c", held)
    for rename in ("weight=w", ["weight=w"], {"weight": "w"}, [("weight", "w")]):
        with ckpt.open(source, rename=rename, part="critic") as opened:
            assert list(opened) == ["w"] and not opened["w"].any()
    for wrong in ("weight", [("a", "b", "c")], [("a", 1)]):
        with pytest.raises(CheckpointError, match="not a pair of a regular expression"):
            ckpt.open(source, rename=wrong)  # type: ignore[arg-type]


@pytest.mark.oracle
def test_what_transformers_says_is_told_in_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        installed.ask({"model_type": "unheard of", "architectures": ["Unheard"]})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("equal", "others"), [(1, 1), (21, 1), (1, 2)])
def test_what_is_compared_is_told_in_numbers_that_are_true(equal: int, others: int) -> None:
    checks = {"compared_with": "model states", "compared_tensors": equal, "unlike_tensors": []}
    checks |= {"uncompared_tensors": ["x"] * others, "uncompared_buffers": others}
    checks |= {"compared_bytes": 10**9, "source_bytes": 10**9 + 4}
    line, open_points = comparison.words(WeightChecks(verified=True, **checks))
    assert line is not None and "(99.9 % of bytes)" in line
    one = ["1 tensor lies there only", "1 buffer is not compared"]
    assert open_points == (
        one if others == 1 else ["2 tensors lie there only", "2 buffers are not compared"]
    )


def test_tensors_that_the_model_file_does_not_have_are_told_apart() -> None:
    checks = {"compared_with": "model states", "compared_tensors": 20, "unlike_tensors": []}
    checks |= {"uncompared_tensors": ["frozen", "a", "b"], "uncompared_buffers": 0}
    checks |= {"compared_bytes": 80, "source_bytes": 100, "without_copy": 2}
    _, open_points = comparison.words(WeightChecks(verified=True, **checks))
    assert open_points == [
        "2 tensors are not there, but in the optimizer's files",
        "1 tensor lies there only",
    ]


def test_one_is_not_several() -> None:
    one = reports.specials(WeightChecks(verified=True, nan={"a": 1}, inf={"b": 1}))
    assert one == ["1 NaN in 1 tensor: a (1)", "1 infinite number in 1 tensor: b (1)"]
    two = reports.specials(WeightChecks(verified=True, inf={"b": 2}))
    assert two == ["2 infinite numbers in 1 tensor: b (2)"]
