"""What lies beside the weights of an output: the allow list, code, configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ROOT, run
from stage0 import save_stage0

from ckpt.weights.companions import model_folder
from ckpt.weights.companions.reader_files import VOCABULARY_FILES

VALUES = {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4)}
CONFIG = {"model_type": "llama", "vocab_size": 6, "hidden_size": 4}
TO = ("--check", "none")
NO_TOKENIZER = "note: no tokenizer lies in the checkpoint or its run: --tokenizer DIR takes one\n"


def put(root: Path, *names: str, content: Any = "x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def files(folder: Path) -> set[str]:
    """What a conversion copied or wrote, but for the weights and its record."""
    own = {"model.safetensors", "conversion.json"}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found - own


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_stage0(tmp_path / "c/d", VALUES)


def test_the_frozen_names_are_those_of_the_installed_transformers() -> None:
    import transformers

    sys.path.insert(0, str(ROOT / "scripts/tables"))
    from reader_files import vocabulary_files

    found = vocabulary_files(Path(transformers.__file__).parent)
    assert len(found) > 20 and found <= set(VOCABULARY_FILES)


def test_a_tokenizer_class_that_imports_is_in_the_table_too() -> None:
    from transformers import PhobertTokenizer, WhisperTokenizer

    for tokenizer in (PhobertTokenizer, WhisperTokenizer):
        assert set(tokenizer.vocab_files_names.values()) <= set(VOCABULARY_FILES)


def test_every_file_of_a_tokenizer_or_processor_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    wanted = {
        *VOCABULARY_FILES,
        *("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "chat_template.jinja"),
        *("chat_template.json", "special_tokens_map.json", "added_tokens.json"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
        *("generation_config.json", "additional_chat_templates/tool_use.jinja"),
        *("qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/vocab.txt"),
        *("speaker_embeddings_path.json", "speaker_embeddings/v2/en_1.npy"),
    }
    put(checkpoint, *wanted)
    run("to-fp32", checkpoint, "-o", tmp_path / "m", *TO)
    assert files(tmp_path / "m") == wanted


def test_nothing_of_the_training_and_no_secret_is_copied(checkpoint: Path, tmp_path: Path) -> None:
    unwanted = {
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt"),
        *("rng_state.pth", "rng_state_0.pth", "random_states_0.pkl", "trainer_state.json"),
        *("training_args.bin", "zero_to_fp32.py", "train.py", "secrets_local.py", "qlora_cfg.py"),
        *(
            ".env",
            "secrets.json",
            "tokenizer_secret.json",
            "tokenizer_private_key.json",
            "id_rsa",
            "notes.txt",
            "README.md",
        ),
        *("wandb/config.json", "qformer_tokenizer/optimizer.pt", "runs/vocab.txt"),
    }
    put(checkpoint, *unwanted)
    run("to-fp32", checkpoint, "-o", tmp_path / "m", *TO)
    assert files(tmp_path / "m") == set()


def test_of_the_code_only_what_auto_map_needs_is_copied(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkpoint, "config.json", content=CONFIG | {"auto_map": {"AutoModel": "modeling_x.X"}})
    put(checkpoint, "modeling_x.py", content="from .layers import A\nfrom . import gone\n")
    put(checkpoint, "layers.py", "secrets_local.py")
    put(checkpoint, "tokenizer_config.json", content={"auto_map": {"AutoTokenizer": "own.T"}})
    names = (
        'VOCAB_FILES_NAMES = {"vocab_file": "ice.model", "bad": "../../up", "b": "optimizer.pt"}\n'
    )
    put(checkpoint, "own.py", content=names)
    put(checkpoint, "ice.model", "optimizer.pt")
    run("to-fp32", checkpoint, "-o", tmp_path / "m", *TO)

    assert files(tmp_path / "m") == {
        *("config.json", "modeling_x.py", "layers.py", "own.py", "ice.model"),
        "tokenizer_config.json",
    }
    assert "note: modeling_x.py names 'gone', but this folder has no such Python file" in (
        capsys.readouterr().err
    )


def test_that_a_model_of_text_gets_no_tokenizer_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_images = {"model_type": "vit", "hidden_size": 4}
    of_both = {"model_type": "llava", "text_config": CONFIG, "vision_config": of_images}
    for number, (config, is_of_text) in enumerate(
        ((CONFIG, True), (of_both, True), (of_images, False))
    ):
        put(checkpoint, "config.json", content=config)
        run("to-fp32", checkpoint, "-o", tmp_path / str(number), *TO)
        assert (NO_TOKENIZER in capsys.readouterr().err) == is_of_text

    put(tmp_path / "t", "spiece.model")
    put(checkpoint, "config.json", content=CONFIG)
    run("to-fp32", checkpoint, "-o", tmp_path / "m", "--tokenizer", tmp_path / "t", *TO)
    put(checkpoint, "qformer_tokenizer/vocab.txt")
    run("to-fp32", checkpoint, "-o", tmp_path / "n", *TO)
    run("to-fp32", checkpoint, "-o", tmp_path / "s", "--names", "as-stored")
    assert NO_TOKENIZER not in capsys.readouterr().err


def test_a_checkpoint_without_a_config_takes_one_from_elsewhere(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", checkpoint, "-o", tmp_path / "none", *TO)
    said = capsys.readouterr().err
    assert "no config.json in the checkpoint" in said
    assert "--config DIR takes" in said and "--tokenizer DIR" in said

    base = tmp_path / "base"
    put(
        base,
        "config.json",
        content=CONFIG | {"auto_map": {"AutoModel": "m.X"}, "dtype": "bfloat16"},
    )
    put(base, "m.py", "tokenizer.json", "generation_config.json", "train.py")
    for number, option in enumerate(("--config", "--base")):
        run("to-fp32", checkpoint, "-o", tmp_path / str(number), option, base, *TO)
        assert capsys.readouterr().err == ""
        assert files(tmp_path / str(number)) == {
            *("config.json", "m.py", "tokenizer.json", "generation_config.json"),
        }
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["dtype"] == "float32" and config["vocab_size"] == 6

    run("to-fp32", checkpoint, "-o", tmp_path / "file", "--config", base / "config.json", *TO)
    assert files(tmp_path / "file") == {"config.json", "m.py"}
    run("to-fp32", checkpoint, "-o", tmp_path / "tokens", "--tokenizer", base, *TO)
    assert files(tmp_path / "tokens") == {"tokenizer.json"}  # m.py is the model's

    put(base, "tokenizer_config.json", content={"auto_map": {"AutoTokenizer": ["own.T", None]}})
    put(base, "own.py")
    run("to-fp32", checkpoint, "-o", tmp_path / "own", "--tokenizer", base, *TO)
    assert files(tmp_path / "own") == {"tokenizer.json", "tokenizer_config.json", "own.py"}


def test_what_the_user_names_wins_and_that_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkpoint, "config.json", content=CONFIG | {"model_type": "own"})
    put(checkpoint, "tokenizer.json", "vocab.txt", content="own")
    base = tmp_path / "base"
    put(base, "config.json", content=CONFIG)
    put(base, "tokenizer.json", "tokenizer_config.json", content="{}")

    run("to-fp32", checkpoint, "-o", tmp_path / "m", "--config", base, *TO)
    assert "config.json is the one that --config names, not the checkpoint's" in (
        capsys.readouterr().err
    )
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "m/tokenizer.json").read_text() == "own"  # a tokenizer is taken whole
    assert files(tmp_path / "m") == {"config.json", "tokenizer.json", "vocab.txt"}

    run("to-fp32", checkpoint, "-o", tmp_path / "n", "--tokenizer", base, *TO)
    assert "the tokenizer is the one that --tokenizer names" in capsys.readouterr().err
    assert files(tmp_path / "n") == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    record = (tmp_path / "m/conversion.json").read_text()
    assert str(tmp_path) not in record  # no folder of the machine


@pytest.mark.parametrize(
    ("option", "name", "why"),
    [
        ("--config", "nowhere", "does not exist"),
        ("--config", "empty", "holds no config.json"),
        ("--config", "bad.json", "is not JSON"),
        ("--config", "pointer.json", "is a Git LFS pointer"),
        ("--tokenizer", "nowhere", "does not exist"),
        ("--tokenizer", "empty", "holds no files of a tokenizer"),
        ("--tokenizer", "bad.json", "is a file; name its folder"),
    ],
)
def test_what_the_user_names_and_is_not_there_is_an_error(
    option: str,
    name: str,
    why: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "bad.json", content="{")
    put(tmp_path, "pointer.json", content="version https://git-lfs.github.com/spec/v1\n")
    run("to-fp32", checkpoint, "-o", tmp_path / "m", option, tmp_path / name, *TO, code=1)
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("<!DOCTYPE html><html>", "is a web page (HTML)"),
        (None, "is a link that leads nowhere"),
    ],
)
def test_a_broken_config_is_named_and_does_not_block_the_weights(
    content: str | None,
    why: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is None:
        (checkpoint / "config.json").symlink_to("../blobs/gone")
    else:
        put(checkpoint, "config.json", content=content)
    run("to-fp32", checkpoint, "-o", tmp_path / "m", *TO)
    said = capsys.readouterr().err
    assert f"note: config.json of the checkpoint {why}" in said and "--config DIR" in said
    assert "no config.json in the checkpoint" not in said
    assert files(tmp_path / "m") == set()

    put(tmp_path / "base", "config.json", content=CONFIG)
    run("to-fp32", checkpoint, "-o", tmp_path / "n", "--config", tmp_path / "base", *TO)
    assert files(tmp_path / "n") == {"config.json"} and capsys.readouterr().err == NO_TOKENIZER


def test_a_tokenizer_that_is_a_pointer_or_a_dead_link_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkpoint, "config.json", content=CONFIG)
    put(checkpoint, "tokenizer.json", content="version https://git-lfs.github.com/spec/v1\noid x")
    (checkpoint / "vocab.txt").symlink_to("../blobs/gone")
    run("to-fp32", checkpoint, "-o", tmp_path / "m", *TO)
    assert capsys.readouterr().err.splitlines() == [
        "note: vocab.txt is a link that leads nowhere; it is left out",
        "note: tokenizer.json is a Git LFS pointer, not the file itself: run git lfs pull in its "
        "repository; it is left out",
    ]
    assert files(tmp_path / "m") == {"config.json"}


def test_a_config_beside_flat_state_files_or_one_folder_up_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = save_stage0(tmp_path / "x/flat", VALUES, tag=None)
    put(flat, "config.json", "tokenizer.json", content=CONFIG)
    put(tmp_path / "x", "config.json", content=CONFIG | {"model_type": "another"})
    run("to-fp32", flat, "-o", tmp_path / "m", *TO)
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"
    assert files(tmp_path / "m") == {"config.json", "tokenizer.json"}
    assert capsys.readouterr().err == ""

    inner = save_stage0(tmp_path / "run/state", VALUES)
    put(tmp_path / "run", "config.json", "tokenizer.json", content=CONFIG)
    run("to-fp32", inner, "-o", tmp_path / "n", *TO)
    assert files(tmp_path / "n") == {"config.json", "tokenizer.json"}
    assert "config.json is that of the folder above the checkpoint" in capsys.readouterr().err

    put(tmp_path / "run", "config.json", content={"theme": "dark"})  # of something else
    run("to-fp32", inner, "-o", tmp_path / "o", *TO)
    assert files(tmp_path / "o") == set()


def test_two_models_in_one_folder_do_not_share_a_config_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_stage0(tmp_path / "c", VALUES, tag="pytorch_model")
    larger = {"model.embed_tokens.weight": torch.randn(9, 5)}
    save_stage0(root, larger, tag="pytorch_model_1")
    put(root, "config.json", content=CONFIG)

    run("to-fp32", root, "--tag", "pytorch_model", "-o", tmp_path / "m", *TO)
    said = capsys.readouterr().err
    assert "holds the models pytorch_model, pytorch_model_1 and one config.json, taken for" in said
    assert files(tmp_path / "m") == {"config.json"}

    run("to-fp32", root, "--tag", "pytorch_model_1", "-o", tmp_path / "n", *TO)
    said = capsys.readouterr().err
    assert "of another model than pytorch_model_1" in said and "--config DIR" in said
    assert files(tmp_path / "n") == set()

    put(root / "pytorch_model_1", "config.json", content=CONFIG | {"vocab_size": 9})
    run("to-fp32", root, "--tag", "pytorch_model_1", "-o", tmp_path / "o", *TO)
    assert json.loads((tmp_path / "o/config.json").read_text())["vocab_size"] == 9
    assert capsys.readouterr().err == NO_TOKENIZER


def test_the_files_of_a_reshard_are_those_of_a_model_folder(checkpoint: Path) -> None:
    put(checkpoint, "bpe.codes", "train.py", "config.json")
    assert [path.name for path in model_folder.companions(checkpoint)] == ["bpe.codes"]
