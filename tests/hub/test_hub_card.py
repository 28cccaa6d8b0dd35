"""The model card that a push makes: what the Hub's own client and server take, and no more than
what is known."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import hub
from huggingface_hub import ModelCard
from oracles import FIXTURES, ROOT, run
from PIL import Image
from run_folders import commit, real

from ckpt.hub.content.card import card, plain
from ckpt.hub.content.contents import contents
from ckpt.hub.content.loss_curve import MAX_PICTURE_BYTES, curve
from ckpt.runs.run import RunCheckpoint, open_checkpoint

HOSTILE = [
    "](javascript:alert(1)) <script>alert(1)</script> ![x](http://evil)",
    "a|b\n---\nlicense: mit\n---\n# owned",
    "&lt;b&gt; `code` $x$ ~~y~~ @someone http://evil www.evil.org me@evil.org",
    "\u202egnp.exe \x1b[31m \\",
]


def made(checkpoint: RunCheckpoint, **options: Any) -> tuple[str, dict[str, bytes]]:
    """The card's text, and all that was made for it by name."""
    found = contents(checkpoint, max_shard_size=1 << 40, repo="me/tiny", **options)
    sources = {item.name: item.source for item in found.items if item.name in found.made_names}
    held = {name: source for name, source in sources.items() if isinstance(source, bytes)}
    assert set(held) == set(found.made_names)
    return held["README.md"].decode(), held


def logged(folder: Path, *entries: dict[str, Any]) -> None:
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"log_history": list(entries)}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> RunCheckpoint:
    return real(tmp_path / "out", 500, {"eval_loss": 1.5, "eval_runtime": 3.0, "nan": math.nan})


def test_the_card_says_what_is_known(checkpoint: RunCheckpoint) -> None:
    text, _ = made(checkpoint, dtype="bf16")
    head = ModelCard(text).data.to_dict()
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepspeed", "ckpt"],
    }  # no license, no base model, no results: they are not known
    for line in (
        "# tiny",
        "| model type | llama |",
        "| parameters | 4,944 |",
        "| dtype | bf16 |",
        "| step | 500 |",
        "| epoch | 0.5 |",
        r"| eval\_loss | 1.5 |",
        "| nan | nan |",
        "- Every byte read equals the CRC32 that its file keeps of it.",
    ):
        assert line in text.splitlines(), line
    assert "ZeRO stage 2 (DeepSpeed 0.19.8) on 2 ranks, to bf16." in text
    assert "runtime" not in text and str(checkpoint.folder.parent) not in text
    assert made(checkpoint, dtype="bf16")[0] == text  # the same for the same


def test_the_hub_takes_the_metadata(checkpoint: RunCheckpoint, tmp_path: Path) -> None:
    config = checkpoint.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "org/base-1"}))
    (tmp_path / "card.md").write_text(made(commit(checkpoint.folder, 1))[0])
    code = (
        "import sys; from huggingface_hub import ModelCard\n"
        "card = ModelCard.load(sys.argv[1]); card.validate(); assert card.data.base_model\n"
        "card.data.license = ['mit', 3]\n"
        "try: card.validate()\nexcept ValueError: print('refused')\n"
    )
    with hub(tmp_path / "hub") as server:
        command = [sys.executable, "-c", code, tmp_path / "card.md"]
        told = subprocess.run(command, env=server.env(), capture_output=True, timeout=60)
    assert told.returncode == 0, told.stderr.decode()
    assert told.stdout == b"refused\n"  # so the server does look


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("org/base-1.5", "org/base-1.5"),
        ("gpt2", None),
        ("/home/me/org/base", None),
        ("./base", None),
        ("../base/x", None),
        ("out/checkpoint-500", None),
        ("run/model", None),  # a folder beside the run
        ("org/base/more", None),
        ("org/b\nlicense: mit", None),
        (3, None),
    ],
)
def test_a_base_model_is_named_only_if_it_is_one_of_the_hub(
    named: Any, said: str | None, checkpoint: RunCheckpoint
) -> None:
    (checkpoint.folder.parent.parent / "run/model").mkdir(parents=True)
    config = checkpoint.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": named}))
    assert ModelCard(made(commit(checkpoint.folder, 1))[0]).data.base_model == said


@pytest.mark.parametrize("evil", HOSTILE)
def test_what_files_hold_is_text_and_nothing_else_on_the_card(
    evil: str, checkpoint: RunCheckpoint
) -> None:
    folder = checkpoint.folder
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [evil], "model_type": evil, "_name_or_path": evil}
    (folder / "config.json").write_text(json.dumps(config))
    clean = made(real(folder.parent, 1, {"m": 1.0}))[0]
    text = made(commit(folder, 500, {evil: 1.0}))[0]
    assert ModelCard(text).data.to_dict() == {
        key: value
        for key, value in ModelCard(clean).data.to_dict().items()
        if key != "pipeline_tag"
    }
    shown = plain(evil)
    assert text.count(shown) == 3 and "\n" not in shown and shown.isprintable()
    body = text.replace(shown, "")
    assert not any(word in body for word in ("evil", "script>", "alert", "owned", "gnp"))
    for mark in "<>":
        assert mark not in shown
    for mark in "[](){}*_`|$~:@#":
        assert all(shown[at - 1] == "\\" for at, c in enumerate(shown) if c == mark), mark


def test_a_few_losses_are_a_table_and_more_are_a_picture(checkpoint: RunCheckpoint) -> None:
    logged(checkpoint.folder, {"step": 1, "loss": 3.25}, {"step": 2, "loss": "x"}, {"loss": 1})
    text, held = made(checkpoint)
    assert "| step | training loss |\n|---|---|\n| 1 | 3.25 |" in text and set(held) == {
        "README.md"
    }
    entries = [{"step": s, "loss": 3 / s + s % 7 / 9} for s in range(1, 5000)]
    entries += [{"step": s, "eval_loss": 2 / s} for s in range(1, 5000, 500)]
    entries += [{"step": 5000, "loss": math.nan}, {"step": 10**400, "loss": 1.0}]
    logged(checkpoint.folder, *entries)
    text, held = made(checkpoint)
    assert "![loss by step](loss.png)" in text and "| step | training" not in text
    picture = held["loss.png"]
    assert len(picture) < MAX_PICTURE_BYTES and made(checkpoint)[1]["loss.png"] == picture
    image = Image.open(io.BytesIO(picture))
    image.load()
    assert image.format == "PNG" and image.size == (512, 256)
    colours = image.convert("RGB").getcolors(1 << 16)
    assert colours is not None and len(colours) > 20  # something is drawn
    assert curve([(1.0, 1.0), (2.0, 1.0)]) is None


def test_without_matplotlib_the_losses_are_a_table(
    checkpoint: RunCheckpoint, tmp_path: Path
) -> None:
    logged(checkpoint.folder, *({"step": s, "loss": 3 / s} for s in range(1, 100)))
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    code = (
        "import sys; from pathlib import Path\n"
        "from ckpt.hub.content.contents import contents\n"
        "from ckpt.runs.run import open_checkpoint\n"
        "found = contents(open_checkpoint(Path(sys.argv[1])), max_shard_size=1 << 40)\n"
        "print(*found.made_names); print(found.items[-1].source.decode())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, checkpoint.folder]
    told = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    lines = told.stdout.splitlines()
    assert lines[0] == "README.md"
    rows = lines[lines.index("| step | training loss |") + 2 :]
    assert rows[0] == "| 1 | 3 |" and rows[7] == "| 99 | 0.030303 |" and rows[8] == ""


@pytest.mark.parametrize("kind", ["transformers", "peft", "none"])
def test_the_example_is_python_and_loads_the_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FIXTURES / "trainer-zero3/checkpoint-2"
    text, _ = made(open_checkpoint(source))
    if kind == "transformers":
        run("to-fp32", source, "-o", tmp_path / "me/tiny")
        monkeypatch.chdir(tmp_path)  # so that the name is a folder, and no Hub is needed
        names: dict[str, Any] = {}
        exec(blocks(text), names)
        assert names["model"].num_parameters() == 5968
        return
    facts = {"kind": "adapter", "checkpoint": "c", "dtype": "fp32", "ckpt": "1", "repo": "me/x"}
    facts |= {"revision": "step-1", "pipeline_tag": "text-generation"}
    facts["library_name"] = kind if kind == "peft" else ""
    text = card(facts).decode()
    ast.parse(blocks(text))
    assert "\"me/x\", revision='step-1'" in text
    assert ("AutoPeftModelForCausalLM" in text) == (kind == "peft")


def blocks(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]
