"""The model card: README.md with the metadata that the Hub reads, for a model that has none.

Says only what is known: no license is made up, no results claimed that would need a data set's
name. Whatever comes from a file is escaped, as names of metrics or models may hold anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt.hub.curve import Points, thinned

PICTURE = "loss.png"
LONGEST = 120  # characters of a name
ROWS = 8  # of a table of losses
_MARKS = re.compile(r"([\\`*_{}\[\]()#|~$:@]|(?<=www)\.)", re.IGNORECASE)
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}


def card(
    facts: Mapping[str, Any],
    training: Points = (),
    evaluation: Points = (),
    picture: str | None = None,
) -> bytes:
    """The card of a model with these facts (``facts.of_model`` and more), the same for the same.

    ``picture`` is the name of a picture of the losses; without one they stand in a table.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=facts.get("base_model"),
        library_name=facts.get("library_name"),
        pipeline_tag=facts.get("pipeline_tag"),
        tags=["deepspeed", "ckpt"],
    )
    head = data.to_yaml(line_break="\n").strip()
    return "\n".join(
        ["---", head, "---", "", *_body(facts, training, evaluation, picture)]
    ).encode()


def _body(
    facts: Mapping[str, Any], training: Points, evaluation: Points, picture: str | None
) -> Iterator[str]:
    repo = facts.get("repo")
    yield f"# {plain(repo.rpartition('/')[2] if repo else facts['checkpoint'])}"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in _table(facts):
        yield f"| {name} | {value} |"
    yield ""
    if facts.get("metrics"):
        yield from ("## Metrics", "", "| metric | value |", "|---|---|")
        for name, value in sorted(facts["metrics"].items()):
            yield f"| {plain(name)} | {_number(value)} |"
        yield ""
    yield from _losses(training, evaluation, picture)
    yield from ("## Load it", "", "```python", *_loading(facts), "```", "")
    yield from ("## How the weights were made", "", _made(facts), "")
    for line in facts.get("checks", ()):
        yield f"- {line}"
    yield ""


def _table(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts.get("base_model"):
        yield "base model", f"[{plain(facts['base_model'])}](https://hf.co/{facts['base_model']})"
    if facts.get("model_type"):
        yield "model type", plain(facts["model_type"])
    if facts.get("architecture"):
        yield "architecture", plain(facts["architecture"])
    if facts.get("adapter"):
        yield "adapter", plain(facts["adapter"])
    if facts.get("parameters") is not None:
        yield "parameters", f"{facts['parameters']:,}"
    yield "dtype", plain(facts["dtype"])
    if facts.get("step") is not None:
        yield "step", f"{facts['step']:,}"
    if facts.get("epoch") is not None:
        yield "epoch", _number(facts["epoch"])


def _losses(training: Points, evaluation: Points, picture: str | None) -> Iterator[str]:
    if not training and not evaluation:
        return
    yield from ("## Loss", "")
    if picture is not None:
        yield from (f"![loss by step]({picture})", "")
        return
    for name, points in (("training loss", training), ("evaluation loss", evaluation)):
        if points:
            yield from (f"| step | {name} |", "|---|---|")
            for step, loss in thinned(points, ROWS):
                yield f"| {_number(step)} | {_number(loss)} |"
            yield ""


def _loading(facts: Mapping[str, Any]) -> Iterator[str]:
    """Python that loads the model; the repository's name is checked by whoever gave it."""
    repo = f'"{facts.get("repo") or "org/name"}"'
    if facts.get("revision"):
        repo += f", revision={facts['revision']!r}"
    task = facts.get("pipeline_tag")
    if facts.get("library_name") == "peft":
        name = "AutoPeftModelForCausalLM" if task == "text-generation" else "AutoPeftModel"
        yield from (f"from peft import {name}", "", f"model = {name}.from_pretrained({repo})")
        return
    if facts.get("library_name") != "transformers":
        yield from (
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({repo})  # safetensors files; the model's code is yours",
        )
        return
    name = _AUTO.get(task or "", "AutoModel")
    trust = ", trust_remote_code=True" if facts.get("code") else ""
    yield from (
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained({repo}, dtype="auto"{trust})',
    )


def _made(facts: Mapping[str, Any]) -> str:
    by = f"ckpt {plain(facts['ckpt'])}"
    if facts.get("kind") != "model":
        return f"Written by the training itself, published by {by} unchanged."
    zero = f"ZeRO stage {facts['stage']}" if facts.get("stage") else "DeepSpeed without ZeRO"
    version = f" (DeepSpeed {plain(facts['deepspeed'])})" if facts.get("deepspeed") else ""
    ranks = "1 rank" if facts["world_size"] == 1 else f"{facts['world_size']} ranks"
    kind = (
        "each in the type it is stored in" if facts["dtype"] == "keep" else f"to {facts['dtype']}"
    )
    return (
        f"Converted by {by} from the checkpoint of a training in {plain(facts['precision'])} with "
        f"{zero}{version} on {ranks}, {kind}."
    )


def plain(text: object) -> str:
    """Text that markdown and HTML take for nothing but text: one line, of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    return html.escape(_MARKS.sub(r"\\\1", line), quote=False)


def _number(value: Any) -> str:
    """A number of at most six digits; "nan" and the like as they are."""
    return f"{value:.6g}" if isinstance(value, (int, float)) else plain(value)
