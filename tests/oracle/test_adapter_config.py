"""adapter_config.json: read with bounds, found in the run or asked for, and only where it fits."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt.weights.adapters import adapter_config
from ckpt.weights.companions import model_folder
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.peft import config as configs
from converters.peft import config_fit, expected_layers, names, patterns
from converters.peft.config_fit import Shown
from converters.tensors import DType, Extent, TensorRef
from converters.zero.files.discovery import Place

LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / configs.NAME
    path.write_text(json.dumps(LORA | changes))
    return path


def place(tmp_path: Path) -> Place:
    root = tmp_path / "out" / "checkpoint-4"
    (root / "global_step4").mkdir(parents=True)
    return Place(root, root / "global_step4", "global_step4")


def seen(
    rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj"), **also: tuple[int, ...]
) -> Shown:
    """What the tensors of a LoRA on these targets show."""
    shapes = {f"base_model.model.layers.0.{t}.lora_A.default.weight": (rank, 8) for t in targets}
    shapes |= {f"base_model.model.layers.0.{t}.lora_B.default.weight": (8, rank) for t in targets}
    shapes |= {f"base_model.model.{name}": shape for name, shape in also.items()}
    tensors = {}
    for name, shape in shapes.items():
        size = 4
        for number in shape:
            size *= number
        tensors[name] = TensorRef(DType.F32, shape, (Extent(Path("x"), 0, size),))
    return config_fit.shown(
        names.adapters(tensors)["default"], tensors, config_fit.untouched(tensors)
    )


def found(where: Place, request: Request | None = None, shown: Shown | None = None) -> Path | None:
    asked = request or Request()
    return adapter_config.configuration(where, asked, "default", shown or seen()).path


def test_it_is_looked_for_in_the_checkpoint_then_in_the_run(tmp_path: Path) -> None:
    where = place(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        found(where)
    said = str(raised.value)
    assert "LoRA adapter, r=4 on q_proj, v_proj" in said and "--adapter-config PATH" in said

    beside = write(where.root.parent / "checkpoint-2")
    assert found(where) == beside
    run = write(where.root.parent)
    assert found(where) == run
    in_tag = write(where.folder)
    assert found(where) == in_tag
    own = write(where.root)
    assert found(where) == own
    named = write(tmp_path / "elsewhere")
    assert found(where, Request(adapter_config=named)) == named
    assert found(where, Request(adapter_config=named.parent)) == named


def test_configurations_of_a_run_that_differ_are_not_chosen_from(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root.parent / "checkpoint-1", target_modules=["v_proj", "q_proj"])
    write(where.root.parent / "checkpoint-2")
    assert found(where)  # in another order
    write(where.root.parent / "checkpoint-3", lora_alpha=16)
    with pytest.raises(CheckpointError, match=r"differ; name the right adapter_config.json"):
        found(where)


def test_those_of_another_run_are_passed_over(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root.parent / "other-run")
    write(where.root.parent / "checkpoint-2", r=8)
    (where.root.parent / "checkpoint-3").mkdir()
    (where.root.parent / "checkpoint-3" / configs.NAME).write_text("no JSON")
    with pytest.raises(CheckpointError, match="--adapter-config"):
        found(where)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"r": 8}, r"rank 8 for layers\.0\.q_proj, whose tensors have rank 4"),
        ({"rank_pattern": {"v_proj": 2}}, "rank 2 for layers.0.v_proj"),
        (
            {"target_modules": ["q_proj"]},
            "target_modules are q_proj, and the tensors adapt layers.0.v",
        ),
        ({"target_modules": r".*q_\w+"}, "and the tensors adapt layers.0.v_proj"),
        ({"use_dora": True}, "with DoRA"),
        ({"peft_type": "IA3"}, "it is of IA3, the tensors are of a LoRA adapter"),
        ({"peft_type": "P_TUNING"}, "it is of p-tuning"),
        ({"lora_alpha": None}, "no lora_alpha, which scales"),
        ({"lora_bias": True}, "says lora_bias, and the tensors have no bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save are lm_head, of which .* no trained"),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices, .* no trained rows"),
        ({"exclude_modules": ["0.q_proj"]}, "exclude_modules leave out layers.0.q_proj"),
        ({"exclude_modules": r".*v_proj"}, "exclude_modules leave out layers.0.v_proj"),
        (
            {"layers_to_transform": 1, "layers_pattern": "layers"},
            r"\(1\) leave out layers.0.q_proj",
        ),
        ({"layers_to_transform": [1, 2], "layers_pattern": ["layers"]}, r"\(1, 2\) leave out"),
        ({"target_modules": None, "layers_to_transform": None, "r": 5}, "rank 5"),
    ],
)
def test_one_that_does_not_fit_is_an_error_that_names_both(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    where = place(tmp_path)
    path = write(where.root, **changes)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as raised:
        found(where)
    assert re.search(why, str(raised.value))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": r"layers\.\d+\.(q|v)_proj"},
        {"target_modules": ["q_proj", "layers.0.v_proj", "k_proj"]},
        {"r": 16, "rank_pattern": {"layers.0.q_proj": 4, r"layers\.\d+\.v_proj": 4}},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": []},
        {"exclude_modules": ["k_proj", "proj"]},
        {"modules_to_save": ["classifier", "score"]},  # as PEFT lists them for any classifier
        {"lora_alpha": None, "alpha_pattern": {"q_proj": 2, "v_proj": 4}},
        {"trainable_token_indices": []},
    ],
)
def test_one_that_fits_is_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    where = place(tmp_path)
    assert found(where, Request()) if write(where.root, **changes) else None


def test_a_trained_module_has_to_be_in_it(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root)
    shown = seen(**{"score.modules_to_save.default.weight": (2, 8)})
    with pytest.raises(CheckpointError, match=r"modules_to_save are none, .* a trained score"):
        found(where, shown=shown)
    write(where.root, modules_to_save=["score"])
    assert found(where, shown=shown)


def test_a_module_that_is_in_it_has_to_be_trained(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root, modules_to_save=["embed_tokens", "lm_head"])
    saved = {"lm_head.modules_to_save.default.weight": (2, 8)}
    assert found(where, shown=seen(**saved))  # this model may have no embed_tokens
    plain = {"model.embed_tokens.weight": (9, 8)}
    with pytest.raises(CheckpointError, match="modules_to_save are embed_tokens, of which"):
        found(where, shown=seen(**saved, **plain))


def test_the_rows_of_trained_tokens_are_counted(tmp_path: Path) -> None:
    where = place(tmp_path)
    rows = {"embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 8)}
    write(where.root, trainable_token_indices={"embed_tokens": [3, 5]})
    assert found(where, shown=seen(**rows))
    write(where.root, trainable_token_indices=[3, 5, 6])
    with pytest.raises(CheckpointError, match=r"trainable_token_indices are 3, .* 2 rows of embed"):
        found(where, shown=seen(**rows))
    write(where.root)
    with pytest.raises(CheckpointError, match=r"no trainable_token_indices, .* rows of embed"):
        found(where, shown=seen(**rows))


def test_of_no_targets_only_those_that_peft_chooses_fit(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root, target_modules=None)
    config = configs.read(where.root)
    assert expected_layers.unchosen(config, seen().trained) is None
    why = expected_layers.unchosen(config, seen(targets=("q_proj", "down_proj")).trained)
    assert why == "it has no target_modules, and the tensors adapt down_proj, q_proj"


def test_biases_of_the_factors_have_to_be_in_it(tmp_path: Path) -> None:
    where = place(tmp_path)
    bias = {"layers.0.q_proj.lora_B.default.bias": (8,)}
    write(where.root)
    with pytest.raises(CheckpointError, match="says no lora_bias"):
        found(where, shown=seen(**bias))
    write(where.root, lora_bias=True)
    assert found(where, shown=seen(**bias))


def test_a_configuration_two_folders_up_is_of_another_run(tmp_path: Path) -> None:
    where = place(tmp_path)
    write(where.root.parent.parent)
    with pytest.raises(CheckpointError, match="--adapter-config"):
        found(where)


def test_scaling_is_by_pattern_and_rank() -> None:
    config = configs.parse(LORA | {"alpha_pattern": {"v_proj": 32}, "lora_alpha": 8})
    assert config.scaling("layers.0.q_proj", 4) == 2
    assert config.scaling("layers.0.v_proj", 4) == 8
    assert config.scaling("layers.0.av_proj", 4) == 2
    assert configs.parse(LORA | {"use_rslora": True}).scaling("q_proj", 16) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "expected an object"),
        ("{}", "peft_type is None"),
        ('{"peft_type": 3}', "peft_type is 3"),
        ('{"peft_type": "LORA", "r": "4"}', "r is '4'"),
        ('{"peft_type": "LORA", "r": -1}', "r is -1"),
        ('{"peft_type": "LORA", "lora_alpha": true}', "lora_alpha is True"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "not an adapter configuration"),
        ('{"peft_type": "LORA", "rank_pattern": []}', "rank_pattern is"),
        ('{"peft_type": "LORA", "alpha_pattern": {"a": "b"}}', "alpha_pattern is"),
        ('{"peft_type": "LORA", "target_modules": [1]}', "target_modules is"),
        ('{"peft_type": "LORA", "trainable_token_indices": ["a"]}', "trainable_token_indices is"),
        ('{"peft_type": "LORA", "peft_type": "IA3"}', "stands in it twice"),
        ("[" * 100_000, "not an adapter configuration"),
    ],
)
def test_a_file_of_another_content_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / configs.NAME
    path.write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(why)) as raised:
        configs.read(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / configs.NAME
    with open(path, "wb") as file:
        file.truncate(configs.MAX_CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="expected at most"):
        configs.read(path)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            configs.read(path)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            model_folder.read_object(path)


PATTERNS = (
    r"^(?!.*patch_embed).*(?:q_proj|k_proj)",
    r".*\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"[^.]*",
    r"model\.layers\.(1[0-9]|2[0-3])\..*(?:attn|mlp).*_proj",
    r"q_proj",
    r"a{2,3}?x*",
    r".*\b(q)\b.*",
    r"(a|ab)*(b?)$",
    r"\w+[.\-]\S*",
    "",
)
NAMES = (
    *("model.layers.1.self_attn.q_proj", "model.layers.12.mlp.up_proj", "q_proj", "aaab", "aaxx"),
    *("model.patch_embed.q_proj", "visual.q", "", "ababb", "x-y"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_those_of_re(pattern: str) -> None:
    for name in NAMES:
        assert patterns.matches(pattern, name) == bool(re.fullmatch(pattern, name)), name
        looked_up = re.match(rf"(.*\.)?({pattern})$", name)
        assert patterns.ends_with(pattern, name) == bool(looked_up), name


def test_a_pattern_takes_no_exponential_time() -> None:
    start = time.monotonic()
    assert not patterns.matches(r"(a+)+b", "a" * 2000)
    assert not patterns.matches(r"(.*a.*)*(.*b.*)*c", "ab" * 200)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "pattern", ["(", r"(a)\1", "(?<=a)b", "a{1000}", "(((a*)*)*)*", "x" * 5000, "(?i:a)"]
)
def test_a_pattern_that_is_not_read_is_an_error(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is not read"):
        patterns.matches(pattern, "a")


@pytest.mark.parametrize(
    ("kind", "example"),
    [("LORA", ", such as lora_alpha:"), ("IA3", ", such as feedforward_modules:"), (None, ":")],
)
def test_what_no_tensor_holds_is_of_the_kind(
    kind: str | None, example: str, tmp_path: Path
) -> None:
    shown = dataclasses.replace(seen(), peft_type=kind)
    with pytest.raises(CheckpointError) as raised:
        found(place(tmp_path), shown=shown)
    assert f"no tensor holds the values of that file{example} name the file" in str(raised.value)
