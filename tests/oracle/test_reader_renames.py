"""Names that from_pretrained renames: the rules are transformers' own, and such outputs load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_folders
from heavy_libraries import LateModule, transformers
from oracles import ROOT

from ckpt.weights.companions import model_folder
from ckpt.weights.conversion import convert
from ckpt.weights.reader import renames, table

sys.path.insert(0, str(ROOT / "scripts/tables"))

architecture_builds = LateModule("architecture_builds")
try_architectures = LateModule("try_architectures")

# Where transformers 4.57 had a module between, by the prefix after which it was.
TRANSFORMERS_4 = {
    "LlavaForConditionalGeneration": "model.vision_tower.",
    "LlavaOnevisionForConditionalGeneration": "model.vision_tower.",
    "PaliGemmaForConditionalGeneration": "model.vision_tower.",
    "Gemma3ForConditionalGeneration": "model.vision_tower.",
}


def names_of_transformers_4(name: str, names: list[str]) -> dict[str, str]:
    prefix = TRANSFORMERS_4[name]
    return {each: each.replace(prefix, f"{prefix}vision_model.") for each in names}


@pytest.mark.parametrize(
    "name", [*TRANSFORMERS_4, "AriaForConditionalGeneration", "CLIPModel", "Qwen2VLModel"]
)
def test_names_are_changed_as_transformers_changes_them(name: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    made = architecture_builds.build(getattr(transformers, name), {})
    transforms = get_model_conversion_mapping(made.model, add_legacy=False)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    names = [*made.memory, *made.hub]
    if name in TRANSFORMERS_4:
        names += names_of_transformers_4(name, list(made.memory)).values()
    for old in dict.fromkeys(names):
        new, converter = rename_source_key(old, renamings, converters)
        found = renames.renamed(name, [old]) or {old: old}
        if converter is None:
            assert list(found) == [new], old


@pytest.mark.parametrize("name", TRANSFORMERS_4)
def test_a_model_of_transformers_4_loads_as_was_said(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = try_architectures.tiny(getattr(transformers, name))
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    old_names = names_of_transformers_4(name, list(state))
    checkpoint = zero_folders.save(_Renamed(state, old_names), tmp_path / "checkpoint")
    model.config.architectures = [name]
    model.config.save_pretrained(checkpoint)

    facts = convert.run(convert.prepare(checkpoint, tmp_path / "model"))

    assert facts["loads"] is True and "from_pretrained renames these" in facts["verdict"]
    loaded, info = getattr(transformers, name).from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    values = loaded.state_dict()
    assert all(torch.equal(values[key], value) for key, value in state.items())


def test_without_a_tensor_of_transformers_4_it_is_missing(tmp_path: Path) -> None:
    name = "LlavaForConditionalGeneration"
    reader = table.reader_of(name)
    assert reader is not None
    made = architecture_builds.build(getattr(transformers, name), {})
    config = made.model.config.to_dict()
    old_names = [*names_of_transformers_4(name, list(made.memory)).values()]

    assert reader.fit(old_names, config).exact

    lost = next(each for each in old_names if each.endswith("q_proj.weight"))
    fit = reader.fit([each for each in old_names if each != lost], config)
    assert len(fit.missing) == 1 and not fit.unexpected


def test_two_tensors_that_get_one_name_are_not_renamed() -> None:
    names = ["vision_tower.x.weight", "model.vision_tower.x.weight"]
    assert renames.renamed("LlavaForConditionalGeneration", names[:1]) == {names[1]: names[0]}
    assert renames.renamed("LlavaForConditionalGeneration", names) is None
    assert renames.renamed("LlamaForCausalLM", names) is None


def test_the_class_is_taken_from_the_text_part_where_transformers_4_writes_it() -> None:
    text = {"text_config": {"architectures": ["Qwen2VLForConditionalGeneration"]}}
    assert model_folder.architecture(text) == "Qwen2VLForConditionalGeneration"
    assert model_folder.architecture({"architectures": ["A"], **text}) == "A"
    assert model_folder.architecture({"text_config": None}) is None


class _Renamed(torch.nn.Module):
    """Tensors under other names, as the modules of another version have them."""

    def __init__(self, state: dict[str, Any], names: dict[str, str]):
        super().__init__()
        for key, value in state.items():
            *path, last = names[key].split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, torch.nn.Parameter(value))
