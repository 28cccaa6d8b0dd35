"""Where the table of names has doubts, the installed transformers has the last word."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_folders
from heavy_libraries import transformers
from oracles import run

from ckpt.weights.conversion import convert
from ckpt.weights.reader import installed
from ckpt.weights.request import Request
from converters.errors import CheckpointError

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}
AUTO = Request(check="auto")


def saved(model: torch.nn.Module, folder: Path, **config: Any) -> Path:
    """A ZeRO-2 checkpoint with the model's configuration, in which ``config`` differs."""
    checkpoint = zero_folders.save(model, folder)
    model.config.architectures = [type(model).__name__]
    model.config.update(config)
    model.config.save_pretrained(checkpoint)
    return checkpoint


def decoder() -> transformers.BertLMHeadModel:
    """Two fields together give it names that the table does not have."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    return transformers.BertLMHeadModel(config)


def test_what_the_table_would_refuse_is_written_where_transformers_loads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = decoder()
    checkpoint = saved(model, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="20 trained tensors would not be read"):
        convert.prepare(checkpoint, tmp_path / "output")

    run("to-fp32", checkpoint, "-o", tmp_path / "output")  # the command asks by itself

    printed = capsys.readouterr()
    assert "loads as BertLMHeadModel of transformers" in printed.out
    assert "transformers was asked" in printed.err
    loaded, info = transformers.BertLMHeadModel.from_pretrained(
        tmp_path / "output", output_loading_info=True
    )
    assert not any(info.values())
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_what_both_refuse_is_refused_and_says_that_transformers_was_asked(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    checkpoint = saved(model, tmp_path / "checkpoint", num_hidden_layers=3)

    with pytest.raises(CheckpointError) as raised:
        convert.prepare(checkpoint, request=AUTO)

    assert raised.value.kind == "unloadable"
    assert "9 of its 30 names are missing" in str(raised.value)
    assert "the installed transformers was asked and says the same" in str(raised.value)


def test_without_an_answer_the_table_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(*_: Any) -> dict[str, Any]:
        raise installed.NoAnswerError("transformers is not installed")

    monkeypatch.setattr(installed, "ask", no_answer)
    checkpoint = saved(decoder(), tmp_path / "checkpoint")

    with pytest.raises(CheckpointError, match='check="transformers" asks'):
        convert.prepare(checkpoint, request=AUTO)


def test_a_model_without_doubts_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "ask", lambda *_: pytest.fail("asked"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    checkpoint = saved(model, tmp_path / "checkpoint")

    assert convert.prepare(checkpoint, request=AUTO).verdict.loads is True


def test_kinds_of_layers_that_lie_elsewhere_are_noticed(tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 16}
    sizes |= {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 16}
    sizes |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    sizes |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    sizes |= {"num_hidden_layers": 4}
    kinds = ["linear_attention", "full_attention"] * 2
    config = transformers.Qwen3NextConfig(**sizes, layer_types=kinds)
    model = transformers.Qwen3NextForCausalLM(config)

    right = saved(model, tmp_path / "right")
    assert convert.prepare(right, request=AUTO).verdict.loads is True

    swapped = saved(model, tmp_path / "swapped", layer_types=kinds[::-1])
    assert convert.prepare(swapped).verdict.loads is True  # by the table alone
    with pytest.raises(CheckpointError, match="would not load these weights"):
        convert.prepare(swapped, request=AUTO)


def test_nobody_is_asked_to_build_a_model_of_a_thousand_million_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "ask", lambda *_: pytest.fail("asked"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    checkpoint = saved(model, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 10**9
    (checkpoint / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"config\.json says num_hidden_layers 1000000000"):
        convert.prepare(checkpoint, request=AUTO)


def test_untie_and_tied_drop_contradict_each_other(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    checkpoint = saved(model, tmp_path / "checkpoint")

    with pytest.raises(CheckpointError, match='untie=True does not go with tied="drop"'):
        convert.prepare(checkpoint, tied="drop", request=Request(untie=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits memory")
def test_a_model_that_takes_too_much_memory_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 2000}).to_dict()
    monkeypatch.setattr(installed, "MAX_BUILD_BYTES", 48 << 20)
    monkeypatch.setattr(installed, "subprocess", subprocess)  # whose memory is limited: a fresh one
    with pytest.raises(installed.NoAnswerError, match=r"takes more than 50\.33 MB of memory"):
        installed.ask(config, "BertModel")


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ("raise SystemError('returned NULL without setting an exception')", "memory is short, or"),
        ("raise ImportError('x.so: failed to map segment from shared object')", "memory is short"),
        ("import os; os.abort()", "was ended by SIGABRT, which happens where memory is short"),
        ("raise MemoryError", "takes more than 2.15 GB of memory"),
        ("raise ValueError('no such rope')", "config.json: ValueError: no such rope"),
    ],
)
def test_a_process_that_dies_is_told_in_a_sentence(
    child: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "_CHILD", child)
    monkeypatch.setattr(installed, "subprocess", subprocess)
    with pytest.raises(installed.NoAnswerError, match=f"(?s).*{re.escape(words)}"):
        installed.ask({"model_type": "bert"})


def test_a_decoder_may_have_a_vocabulary_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.MarianConfig(
        vocab_size=64,
        decoder_vocab_size=80,
        share_encoder_decoder_embeddings=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=0,
    )
    checkpoint = saved(transformers.MarianMTModel(config), tmp_path / "checkpoint")

    run("to-fp32", checkpoint, "-o", tmp_path / "output", "--check", "names")

    printed = capsys.readouterr()
    assert "loads as MarianMTModel: 47 of 47 names" in printed.out
    assert "rows" not in printed.err
