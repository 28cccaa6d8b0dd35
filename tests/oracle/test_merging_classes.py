"""to-fp32 --merge of classifiers whose base was saved with another head, or with none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models
import pytest
from heavy_libraries import peft, transformers
from test_merging import Run

from ckpt.weights.adapters import base_model
from ckpt.weights.merge import trained_class
from converters.errors import CheckpointError
from converters.peft.config import AdapterConfig
from converters.tensors import DType, TensorRef, Weights


def bert(class_name: str) -> Any:
    """A model of one layer, of a class of transformers."""
    config = transformers.BertConfig(
        vocab_size=peft_models.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    return getattr(transformers, class_name)(config)


def lora(**options: Any) -> Any:
    options = {"r": 2, "target_modules": ["query"], "init_lora_weights": False} | options
    return peft.LoraConfig(**options)


CASES = {  # the trained model, its adapter, and the class that its base was saved as
    "task": (
        lambda: peft_models.llama(head="classes"),
        lambda: lora(target_modules=["q_proj"], task_type="SEQ_CLS"),
        "LlamaForCausalLM",
    ),
    "tied": (
        lambda: peft_models.llama(head="classes", tied=True),
        lambda: lora(target_modules=["q_proj"], task_type="SEQ_CLS"),
        "LlamaForCausalLM",
    ),
    "no task": (
        lambda: peft_models.llama(head="classes"),
        lambda: lora(target_modules=["q_proj"], modules_to_save=["score"]),
        "LlamaForCausalLM",
    ),
    "masked": (
        lambda: bert("BertForTokenClassification"),
        lambda: lora(task_type="TOKEN_CLS"),
        "BertForMaskedLM",
    ),
    "inner": (
        lambda: bert("BertForTokenClassification"),
        lambda: lora(task_type="TOKEN_CLS"),
        "BertModel",
    ),
    "pooler": (
        lambda: bert("BertForSequenceClassification"),
        lambda: lora(task_type="SEQ_CLS"),
        "BertForMaskedLM",
    ),
}


class SavedOtherwise(Run):
    """A run whose base was saved as another class, with two labels as in a new configuration."""

    def save_base(self, base: Any) -> None:
        config = type(base.config)(**base.config.to_dict() | {"num_labels": 2})
        model = getattr(transformers, CASES[self.kind][2])(config)
        prefix = "" if hasattr(model, base.base_model_prefix) else f"{base.base_model_prefix}."
        values = {name.removeprefix(prefix): value for name, value in base.state_dict().items()}
        own = model.state_dict()
        model.load_state_dict({n: v for n, v in values.items() if n in own}, strict=False)
        super().save_base(model)

    def __init__(self, kind: str, root: Path, exclude_frozen: bool):
        self.kind = kind
        super().__init__(kind, root, exclude_frozen=exclude_frozen)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_a_head_that_the_trained_class_has_not_is_left_out(
    kind: str, exclude_frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peft_models.KINDS, kind, CASES[kind][:2])
    run = SavedOtherwise(kind, tmp_path, exclude_frozen)
    if kind == "pooler" and exclude_frozen:  # which was new and frozen, and is nowhere
        with pytest.raises(CheckpointError, match=r"such as bert\.pooler\.dense\.bias"):
            run.prepare(base=run.base)
        return

    facts = run.merge(base=run.base)

    config = json.loads((run.output / "config.json").read_text())
    assert config["architectures"] == [type(run.model.get_base_model()).__name__]
    assert len(config["id2label"]) == 3
    assert facts["loads"] and facts["verdict"].count("loads as") == 1
    if kind != "tied":  # whose head is in no file
        assert any("in the base, but not part of" in note for note in facts["notes"])
    assert any("not in the base" in note for note in facts["notes"]) is (kind == "pooler")
    run.require_same_logits()


def test_layers_of_a_base_are_never_left_out() -> None:
    ref = TensorRef(DType.F32, (0,), ())
    names = ("lm_head.weight", "model.layers.7.mlp.up_proj.weight", "model.norm.weight")
    loaded = base_model.Loaded(Weights(dict.fromkeys(names, ref)), {}, "", "LlamaForCausalLM")
    fitted = trained_class.fitted(loaded, "LlamaForSequenceClassification", ["score.weight"])
    assert fitted.surplus == ("lm_head.weight",) and fitted.of_other_class
    for name in ("LlamaForCausalLM", "Unheard", None):
        assert not trained_class.fitted(loaded, name, ["score.weight"]).surplus


def test_the_class_is_that_of_the_task_or_the_one_that_knows_the_names() -> None:
    config = {"architectures": ["LlamaForCausalLM"]}
    noted = {"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}}
    task = AdapterConfig("LORA", {}, task_type="TOKEN_CLS")
    plain, other = AdapterConfig("LORA", {}), AdapterConfig("LORA", noted)
    own = ("score.weight", "model.norm.weight")
    assert trained_class.architecture(config, [task], own) == "LlamaForTokenClassification"
    assert trained_class.architecture(config, [plain], own) == "LlamaForCausalLM"
    assert trained_class.architecture(config, [other], own) == "LlamaForSequenceClassification"
    assert trained_class.architecture(config, [other], own[1:]) == "LlamaForCausalLM"
    assert trained_class.architecture(None, [task], own) is None
