"""Tied weights and input embeddings, by the table of classes: T5, BART, GPT-NeoX and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from heavy_libraries import transformers
from safetensors.torch import load_file
from test_merging import IDS, Run

from ckpt.weights.adapters import base_names
from ckpt.weights.conversion import convert
from ckpt.weights.merge import merged_config
from ckpt.weights.naming import ties
from ckpt.weights.reader import table, untying
from ckpt.weights.reader.table import Reader
from converters.peft import embeddings, names
from converters.peft.merge.model import Merge
from converters.tensors import DType, Extent, TensorRef, Weights

T5 = {
    **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 64},
    **{"num_layers": 1, "num_decoder_layers": 1, "tie_word_embeddings": True},
}
STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def weights(*tensors: str, rows: int = 64, **aliases: str) -> Weights:
    """Tensors of so many rows; ``aliases`` have ``__`` for each dot."""
    whole = (Extent(Path("weights"), 0, rows * 32),)
    refs = {name: TensorRef(DType.F32, (rows, 8), whole) for name in tensors}
    return Weights(refs, {name.replace("__", "."): owner for name, owner in aliases.items()})


def reader(name: str) -> Reader:
    found = table.reader_of(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "owner", "tied"),
    [
        ("T5ForConditionalGeneration", "shared.weight", (*STACKS, "lm_head.weight")),
        ("Pop2PianoForConditionalGeneration", "shared.weight", STACKS),
        ("BartForConditionalGeneration", "model.shared.weight", ("lm_head.weight",)),
        ("GPTNeoXForCausalLM", "gpt_neox.embed_in.weight", ("lm_head.weight",)),
        (
            "WhisperForConditionalGeneration",
            "model.decoder.embed_tokens.weight",
            ("proj_out.weight",),
        ),
        (
            "BertForMaskedLM",
            "bert.embeddings.word_embeddings.weight",
            ("cls.predictions.decoder.weight",),
        ),
        (
            "Ovis2ForConditionalGeneration",
            "model.language_model.embed_tokens.weight",
            ("lm_head.weight",),
        ),
    ],
)
def test_the_table_says_what_is_tied_to_what(name: str, owner: str, tied: tuple[str, ...]) -> None:
    cls = reader(name)
    known = cls.vocabulary - {each for each in cls.vocabulary if cls.is_tied(each)}

    found = cls.tied(known, {"tie_word_embeddings": True})

    assert {each: found.get(each) for each in tied} == dict.fromkeys(tied, owner)
    assert not set(tied) & cls.tied({*known, *tied}, {}).keys()


def test_a_tied_name_is_written_where_the_reader_has_other_values_for_it(tmp_path: Path) -> None:
    """LoRA on T5's shared: the stacks and the head keep the values that it had before."""
    tied = {"decoder__embed_tokens__weight": STACKS[0], "lm_head__weight": STACKS[0]}
    apart = weights("shared.weight", STACKS[0], **tied)
    assert not ties.spared(apart, tmp_path, T5)

    tied = dict.fromkeys(("decoder__embed_tokens__weight", "lm_head__weight"), "shared.weight")
    same = weights("shared.weight", **tied)
    assert ties.spared(same, tmp_path, T5) == {STACKS[1], "lm_head.weight"}
    # transformers 4 ties the head as the flag says, and 5 always
    assert ties.spared(same, tmp_path, T5 | {"tie_word_embeddings": False}) == {STACKS[1]}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (T5, True),
        (T5 | {"scale_decoder_outputs": False}, False),  # Flan-T5, as transformers 5 writes it
        (T5 | {"tie_word_embeddings": False}, False),  # and 4
        (T5 | {"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
        ({"model_type": "switch_transformers", "scale_decoder_outputs": False}, True),
        ({"model_type": "mt5"}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_a_flag_that_scales_outputs_is_not_changed(config: dict[str, Any], scales: bool) -> None:
    assert untying.scales(config) is scales
    for place in (config, {"model_type": "blip-2", "text_config": config}):
        written = untying.without_ties(place)
        inner = written.get("text_config", written)
        kept = config.get("tie_word_embeddings") if scales else False
        assert inner.get("tie_word_embeddings") is kept
        assert bool(untying.notes(place)) is scales


def test_values_that_transformers_4_would_lose_are_said() -> None:
    t5, own = reader("T5ForConditionalGeneration"), weights("shared.weight", "lm_head.weight")
    flan = T5 | {"scale_decoder_outputs": False}
    assert "--untie writes" in str(untying.note(own, t5, flan))
    assert "no longer scale the outputs" in str(untying.note(own, t5, T5))
    assert untying.note(own, t5, untying.without_ties(flan)) is None

    stacks = weights("shared.weight", STACKS[0])
    for config in (T5, T5 | {"tie_word_embeddings": False}):
        assert "load this model with transformers 5" in str(untying.note(stacks, t5, config))
    bart = reader("BartForConditionalGeneration")
    stacks = weights("model.shared.weight", f"model.{STACKS[0]}")
    assert "--untie writes" in str(untying.note(stacks, bart, {}))
    assert untying.note(stacks, bart, {"tie_word_embeddings": False}) is None


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("T5ForConditionalGeneration", "shared.weight"),
        ("BartForConditionalGeneration", "model.shared.weight"),
        ("GPTNeoXForCausalLM", "gpt_neox.embed_in.weight"),
        ("CTRLLMHeadModel", "transformer.w.weight"),
        ("NotInTheTable", "inner.shared.weight"),
    ],
)
def test_a_resized_vocabulary_is_counted_in_the_configuration(name: str, embedding: str) -> None:
    found = table.reader_of(name)
    config = {"vocab_size": 64, "architectures": [name]}
    config |= {"model_type": found.type} if found else {}

    made = merged_config.of(config, {}, Merge(weights(embedding, rows=70), {}, {}))

    assert made.content is not None
    assert made.content["vocab_size"] == 70
    assert any("vocab_size is 70" in note for note in made.notes)


@pytest.mark.parametrize(
    ("modules", "pair"),
    [  # as get_input_embeddings and get_output_embeddings of transformers 5.23 have it
        (("shared", "encoder.embed_tokens", "lm_head"), ("shared", "lm_head")),
        (
            ("roberta.embeddings.word_embeddings", "lm_head", "lm_head.decoder"),
            ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
        ),
        (
            ("model.decoder.embed_tokens", "proj_out"),
            ("model.decoder.embed_tokens", "proj_out"),
        ),
        (("model.shared", "model.layers.0.attention.output"), ("model.shared",)),
        (("a.b.embed_tokens", "c.embed_tokens"), ("c.embed_tokens",)),
    ],
)
def test_embeddings_are_told_by_their_names(
    modules: tuple[str, ...], pair: tuple[str, ...]
) -> None:
    every = [f"{names.MODEL}{module}.weight" for module in modules]
    layers = embeddings.layers(map(names.parsed, every))
    assert layers == tuple(names.MODEL + module for module in pair)


def test_one_name_that_differs_is_the_other() -> None:
    assert base_names.prefixes(["a.w", "embed_out.w"], ["a.w", "lm_head.w"]) == {
        "embed_out.w": "lm_head.w"
    }


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, **sizes, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


class Seq2SeqRun(Run):
    """A model with a decoder; ``rows`` is its vocabulary after it was resized."""

    rows = 0

    def save_base(self, base: Any) -> None:
        small = t5() if self.rows else base
        if self.rows:  # the same before its vocabulary was resized
            state = {
                k: v[: small.config.vocab_size] if v.shape[0] == self.rows else v
                for k, v in base.state_dict().items()
            }
            small.load_state_dict(state)
        small.save_pretrained(self.base)
        self.model.peft_config["default"].base_model_name_or_path = str(self.base)

    def require_same_logits(self) -> None:
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        with torch.no_grad():
            expected = self.model.eval()(**inputs).logits
            found = self.loaded()(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_t5_with_adapted_embeddings_is_merged(
    exclude_frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft_models._lora(target_modules=["q", "shared"], task_type="SEQ_2_SEQ_LM")
    monkeypatch.setitem(peft_models.KINDS, "t5", (t5, lambda: config))
    run = Seq2SeqRun("t5", tmp_path, exclude_frozen=exclude_frozen)

    facts = run.merge(base=run.base)

    written = json.loads((run.output / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert any("load this model with transformers 5" in note for note in facts["notes"])
    assert {"shared.weight", *STACKS, "lm_head.weight"} <= run.tensors().keys()
    run.require_same_logits()


class Resized(Seq2SeqRun):
    rows = 48


@pytest.mark.parametrize("exclude_frozen", [False, True])
def test_t5_with_a_resized_vocabulary_is_merged(
    exclude_frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resized() -> Any:
        model = t5()
        model.resize_token_embeddings(Resized.rows)
        return model

    config = peft_models._lora(target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    monkeypatch.setitem(peft_models.KINDS, "resized", (resized, lambda: config))
    run = Resized("resized", tmp_path, exclude_frozen=exclude_frozen)

    run.merge(base=run.base)

    assert json.loads((run.output / "config.json").read_text())["vocab_size"] == Resized.rows
    run.require_same_logits()

    convert.run(convert.prepare(run.checkpoint, tmp_path / "adapter"))
    saved, made = (
        load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("live", "adapter")
    )
    assert made.keys() == saved.keys()
    assert f"{names.MODEL}shared.weight" in made


class Headed(Run):
    def save_base(self, base: Any) -> None:
        base.lm_head.weight = base.model.embed_tokens.weight  # which unload() parts
        super().save_base(base)


def test_a_head_that_was_trained_apart_is_untied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft_models._lora(modules_to_save=["lm_head"])
    kind = (lambda: peft_models.llama(tied=True), lambda: config)
    monkeypatch.setitem(peft_models.KINDS, "head", kind)
    for exclude_frozen in (False, True):
        run = Headed("head", tmp_path / str(exclude_frozen), exclude_frozen=exclude_frozen)
        run.merge(base=run.base)
        written = json.loads((run.output / "config.json").read_text())
        assert written["tie_word_embeddings"] is False
        run.require_same_logits()
