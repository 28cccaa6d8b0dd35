"""to-fp32 --merge: what is tied to a frozen parameter, which the checkpoint does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from heavy_libraries import peft, transformers
from test_merging import IDS, Run

from ckpt.weights.naming import naming
from converters.peft.merge import base_ties
from converters.tensors import DType, Extent, TensorRef, Weights

MODEL = "base_model.model."
SHARED, HEAD, ENCODER = "model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight"


def weights(*names: str, aliases: dict[str, str] | None = None) -> Weights:
    """A tensor of its own for each name."""
    tensors = {
        name: TensorRef(DType.F32, (1,), (Extent(Path("file"), 4 * at, 4),))
        for at, name in enumerate(names)
    }
    return Weights(tensors, aliases or {})


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_ties_have_the_names_of_the_users_model(wrapper: str) -> None:
    ties = {
        f"{wrapper}{MODEL}{HEAD}": f"{wrapper}{MODEL}model.shared.base_layer.weight",
        f"{wrapper}{MODEL}{ENCODER}": f"{wrapper}{MODEL}model.shared.base_layer.weight",
    }
    trained = f"{wrapper}{MODEL}model.shared.lora_embedding_A.default"
    found = Weights(
        weights(trained).tensors, absent=dict.fromkeys(ties, "not stored"), lost_ties=ties
    )

    unwrapped = naming.unwrapped(found)

    assert base_ties.of_model(unwrapped.weights) == {HEAD: SHARED, ENCODER: SHARED}
    assert "shared.base_layer" not in " ".join(unwrapped.renamed)  # it is no name of these weights


@pytest.mark.parametrize("stored", [(SHARED,), (ENCODER,), (SHARED, HEAD, ENCODER)])
def test_a_base_has_a_tied_tensor_under_any_of_its_names(stored: tuple[str, ...]) -> None:
    ties = {HEAD: SHARED, ENCODER: SHARED}
    made = base_ties.applied(weights("other", *stored), ties)

    assert set(made.tensors) == {"other", stored[0]}
    assert made.aliases == {n: stored[0] for n in (SHARED, HEAD, ENCODER) if n != stored[0]}
    lacking = weights("other")
    assert base_ties.applied(lacking, ties) is lacking


def bart() -> Any:
    size = {"d_model": 16, "max_position_embeddings": 32, "vocab_size": peft_models.VOCABULARY}
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    width = {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**size, **layers, **heads, **width)
    )


@pytest.mark.parametrize("known", [True, False])  # whether the table has the class
@pytest.mark.parametrize("target", ["shared", "embed_tokens"])
def test_one_of_several_tied_embeddings_is_adapted(
    target: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", target], init_lora_weights=False)
    monkeypatch.setitem(peft_models.KINDS, "bart", (bart, lambda: config))
    run = Run("bart", tmp_path, 3, exclude_frozen=True)
    path = run.base / "config.json"
    text = path.read_text()
    if not known:
        path.write_text(json.dumps(json.loads(text) | {"architectures": ["OfSomebodyElse"]}))

    facts = run.merge(base=run.base)

    assert not facts["absent"]
    if not known:
        written = json.loads((run.output / "config.json").read_text())
        named = written | {"architectures": ["BartForConditionalGeneration"]}
        (run.output / "config.json").write_text(json.dumps(named))
    with torch.no_grad():
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        expected, found = run.model.eval()(**inputs).logits, run.loaded()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
