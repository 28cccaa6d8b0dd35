"""Models of sentence-transformers: the weights of each module in the module's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import make_checkpoint, of_model
from oracles import run
from safetensors.torch import load_file
from stage0 import save_stage0

from ckpt.weights.companions import module_folders
from ckpt.weights.companions.module_folders import Module
from ckpt.weights.request import Request
from converters.errors import CheckpointError

TYPES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "2_Dense": "sentence_transformers.base.modules.dense.Dense",
    "3_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
BERT = {"encoder.layer.0.dense.weight": torch.randn(4, 3), "pooler.dense.bias": torch.randn(3)}
DENSE = {"linear.weight": torch.randn(2, 3), "linear.bias": torch.randn(2)}


def put(root: Path, name: str, content: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def put_surroundings(root: Path) -> None:
    """What ``save_pretrained`` leaves beside the states, the 16-bit weights included."""
    listed = [
        {"idx": at, "name": str(at), "path": folder, "type": kind}
        for at, (folder, kind) in enumerate(TYPES.items())
    ]
    put(root, "modules.json", listed)
    put(root, "config.json", {"model_type": "bert", "hidden_size": 3})
    put(root, "config_sentence_transformers.json", {"model_type": "SentenceTransformer"})
    put(root, "sentence_bert_config.json", {"max_seq_length": 8})
    put(root, "tokenizer.json", {})
    put(root, "1_Pooling/config.json", {"pooling_mode": "cls"})
    put(root, "2_Dense/config.json", {"in_features": 3})
    put(root, "2_Dense/model.safetensors", "of another step")
    put(root, "2_Dense/optimizer.pt", "x")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    values = {f"0.model.{name}": value for name, value in BERT.items()}
    values |= {f"2.{name}": value for name, value in DENSE.items()}
    root = save_stage0(tmp_path / "c", values)
    put_surroundings(root)
    return root


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("inner", ["model", "auto_model"])
def test_each_module_has_its_weights_in_its_own_folder(
    inner: str, checkpoint: Path, tmp_path: Path
) -> None:
    if inner != "model":
        values = {f"0.{inner}.{name}": value for name, value in BERT.items()}
        save_stage0(checkpoint, values | {f"2.{name}": value for name, value in DENSE.items()})
    run("to-fp32", checkpoint, "-o", tmp_path / "m", "--check", "none")

    assert same(load_file(tmp_path / "m/model.safetensors"), BERT)
    assert same(load_file(tmp_path / "m/2_Dense/model.safetensors"), DENSE)
    names = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*")}
    assert names == {
        *("model.safetensors", "config.json", "conversion.json", "modules.json", "tokenizer.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "2_Dense"),
        *("1_Pooling", "1_Pooling/config.json", "2_Dense/config.json"),
        "2_Dense/model.safetensors",
    }

    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert [file["name"] for file in record["files"]] == [
        "model.safetensors",
        "2_Dense/model.safetensors",
    ]
    assert record["renamed"]["pooler.dense.bias"] == f"0.{inner}.pooler.dense.bias"
    assert record["renamed"]["2_Dense/linear.bias"] == "2.linear.bias"
    assert record["tensors"] == 4 and any("modules.json" in rule for rule in record["rules"])


@pytest.mark.parametrize(
    "wishes", [(), ("--strip", "net."), ("--part", "net"), ("--rename", r"^net\.=")]
)
def test_a_sentence_model_inside_another_module(
    wishes: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    values = {f"net.0.model.{name}": value for name, value in BERT.items()}
    save_stage0(checkpoint, values | {f"net.2.{name}": value for name, value in DENSE.items()})
    run("to-fp32", checkpoint, "-o", tmp_path / "m", "--check", "none", *wishes)
    assert same(load_file(tmp_path / "m/model.safetensors"), BERT)
    assert same(load_file(tmp_path / "m/2_Dense/model.safetensors"), DENSE)


def test_a_folder_that_lacks_the_weights_of_a_module_is_not_said_to_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=20, num_hidden_layers=1, **sizes))
    listed = [{"name": str(n), "path": path, "type": TYPES[path]} for n, path in enumerate(TYPES)]
    plain = of_model(tmp_path / "plain", bert)
    put(plain, "modules.json", listed)
    run("to-fp32", plain, "-o", tmp_path / "m")
    record = json.loads((tmp_path / "m/conversion.json").read_text())
    assert record["loads"] is False
    assert record["verdict"].startswith("loads as BertModel: 23 of 23 names; SentenceTransformer ")
    assert record["verdict"].endswith("does not open it without weights of 2_Dense (Dense)")

    inner = {f"net.0.model.{name}": value for name, value in bert.named_parameters()}
    inner |= {f"net.2.{name}": value for name, value in DENSE.items()}
    content = json.loads((plain / "config.json").read_text())
    around = make_checkpoint(tmp_path / "around", inner, config=content)
    put(around, "modules.json", listed)
    run("to-fp32", around, "-o", tmp_path / "n", "--strip", "net.0.model.", code=1)
    assert "SentenceTransformer would not open the output" in capsys.readouterr().err
    run("to-fp32", around, "-o", tmp_path / "n")
    assert json.loads((tmp_path / "n/conversion.json").read_text())["loads"]


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_part_is_one_file_and_the_transformer_is_cut(
    format: str, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--max-shard-size", "10B", "--format", format, "--dtype", "bf16")
    run("to-fp32", checkpoint, "-o", tmp_path / "m", "--check", "none", *options)
    stem = "model.safetensors" if format == "safetensors" else "pytorch_model.bin"
    index = json.loads((tmp_path / "m" / f"{stem}.index.json").read_text())
    assert index["weight_map"].keys() == BERT.keys()

    path = tmp_path / "m/2_Dense" / stem  # sentence-transformers reads no index there
    found = load_file(path) if format == "safetensors" else torch.load(path, weights_only=True)
    assert same(found, {name: value.bfloat16() for name, value in DENSE.items()})


def test_an_interrupted_conversion_goes_on_in_the_folders_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt.weights.conversion import convert

    planned = convert.prepare(checkpoint, tmp_path / "m", request=Request(check="none"))
    left = tmp_path / ".m.partial"
    run("to-fp32", checkpoint, "-o", left, "--check", "none")
    (left / "plan.json").write_text(planned.plan.digest())
    before = (left / "2_Dense/model.safetensors").stat().st_ino
    convert.run(planned)
    assert (tmp_path / "m/2_Dense/model.safetensors").stat().st_ino == before
    assert same(load_file(tmp_path / "m/model.safetensors"), BERT)


def test_without_modules_json_it_is_said_what_is_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_surroundings(tmp_path / "saved")
    bare = save_stage0(
        tmp_path / "bare", {f"0.model.{name}": value for name, value in BERT.items()}
    )
    run("to-fp32", bare, "-o", tmp_path / "m", "--check", "none")
    said = capsys.readouterr().err
    assert "no modules.json says which modules these are" in said
    assert load_file(tmp_path / "m/model.safetensors").keys() == {f"0.model.{n}" for n in BERT}

    run("to-fp32", bare, "-o", tmp_path / "n", "--check", "none", "--config", tmp_path / "saved")
    said = capsys.readouterr().err
    assert same(load_file(tmp_path / "n/model.safetensors"), BERT)
    assert (tmp_path / "n/1_Pooling/config.json").is_file()
    assert "2_Dense (Dense) has no weights in the checkpoint" in said


@pytest.mark.parametrize("second", ["1.model.{}", "2.linear.{}", "1.{}"])
def test_numbered_modules_stay_together_without_modules_json(second: str, tmp_path: Path) -> None:
    names = [f"0.model.{name}" for name in BERT] + ["0.lm_head.weight"]
    values = {name: torch.randn(3, 2) for name in names + [second.format(n) for n in BERT]}
    root = save_stage0(tmp_path / "c", values)
    run("to-fp32", root, "-o", tmp_path / "m")
    assert same(load_file(tmp_path / "m/model.safetensors"), values)


def test_a_module_of_no_checkpoint_gives_nothing_away(checkpoint: Path) -> None:
    put(checkpoint, "modules.json", [{"name": "1", "path": "../secrets", "type": "a.B"}])
    with pytest.raises(CheckpointError, match="outside the model's own"):
        module_folders.modules(checkpoint)
    put(checkpoint, "modules.json", "no JSON")
    with pytest.raises(CheckpointError, match=r"modules\.json is not JSON"):
        module_folders.modules(checkpoint)
    put(checkpoint, "modules.json", [{"name": "1"}])
    with pytest.raises(CheckpointError, match="without a name, a path or a type"):
        module_folders.modules(checkpoint)


def test_the_modules_of_a_router_have_folders_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "modules.json", [{"name": "0", "path": "", "type": "x.Router"}])
    inner = {
        "query_0_StaticEmbedding": "x.StaticEmbedding",
        "document_0_Transformer": "x.Transformer",
    }
    structure = {"query": ["query_0_StaticEmbedding"], "document": ["document_0_Transformer"]}
    put(tmp_path, "router_config.json", {"types": inner, "structure": structure})
    assert module_folders.modules(tmp_path) == (
        Module("0.sub_modules.query.0.", "query_0_StaticEmbedding", "StaticEmbedding"),
        Module("0.sub_modules.document.0.", "document_0_Transformer", "Transformer"),
    )


def vocabulary(tmp_path: Path) -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    put(tmp_path, "vocab.txt", "\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def tiny_model(tmp_path: Path, with_dense: bool = True) -> Any:
    """A tiny model of sentence-transformers itself."""
    import sentence_transformers as library
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    vocabulary(tmp_path).save_pretrained(tmp_path / "bert")
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    parts = [Transformer(str(tmp_path / "bert")), Pooling(8, pooling_mode="cls")]
    if with_dense:
        parts += [Dense(8, 4), Normalize()]
    return library.SentenceTransformer(modules=parts, device="cpu")


@pytest.mark.parametrize("with_dense", [False, True])
def test_sentence_transformers_loads_the_trained_embeddings(
    with_dense: bool, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path, with_dense)
    model.save_pretrained(str(tmp_path / "c"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7).add_(0.05)
    save_stage0(tmp_path / "c", model.state_dict())
    run("to-fp32", tmp_path / "c", "-o", tmp_path / "m")

    texts = ["a b c", "h g", "d e f a"]
    found = type(model)(str(tmp_path / "m"), device="cpu").encode(texts)
    assert (found == model.encode(texts)).all()


def test_a_static_embedding_lies_in_the_models_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sentence_transformers as library
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(vocabulary(tmp_path), embedding_dim=6)
    model = library.SentenceTransformer(modules=[static], device="cpu")
    model.save_pretrained(str(tmp_path / "c"))
    with torch.no_grad():
        static.embedding.weight.add_(1)
    save_stage0(tmp_path / "c", model.state_dict())
    run("to-fp32", tmp_path / "c", "-o", tmp_path / "m")
    assert "config.json" not in capsys.readouterr().err  # such a model has none
    again = library.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert (again.encode(["a b"]) == model.encode(["a b"])).all()


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_routes_of_a_router_load_as_they_were_trained(is_shared: bool, tmp_path: Path) -> None:
    import sentence_transformers as library
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    transformer, pooling = tiny_model(tmp_path, with_dense=False)
    static = StaticEmbedding(vocabulary(tmp_path), embedding_dim=8)
    query = [transformer, pooling] if is_shared else [static]
    router = Router.for_query_document(query, [transformer, pooling])
    model = library.SentenceTransformer(modules=[router], device="cpu")
    model.save_pretrained(str(tmp_path / "c"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.1)
    save_stage0(tmp_path / "c", model.state_dict())
    run("to-fp32", tmp_path / "c", "-o", tmp_path / "m")

    found = library.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert (found.encode_query(["a b"]) == model.encode_query(["a b"])).all()
    assert (found.encode_document(["c d"]) == model.encode_document(["c d"])).all()


@pytest.mark.parametrize("options", [(), ("--merge",)], ids=["adapter", "merged"])
def test_an_adapter_of_a_sentence_model_keeps_the_modules(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path)
    import peft

    kind = peft.TaskType.FEATURE_EXTRACTION
    model.add_adapter(peft.LoraConfig(task_type=kind, r=2, target_modules=["query", "value"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    model.save_pretrained(str(tmp_path / "c"))
    save_stage0(tmp_path / "c", model.state_dict())
    run("to-fp32", tmp_path / "c", "-o", tmp_path / "m", *options)

    dense = load_file(tmp_path / "m/2_Dense/model.safetensors")
    assert torch.equal(dense["linear.weight"], model[2].linear.weight)
    assert (tmp_path / "m/adapter_model.safetensors").is_file() == (not options)
    found = type(model)(str(tmp_path / "m"), device="cpu").encode(["a b c"])
    assert (abs(found - model.encode(["a b c"])) < 1e-6).all()
