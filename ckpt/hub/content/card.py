"""The model card: README.md with the metadata that the Hub reads,
for a model that has none.

Says only what is known: no license is made up, no results claimed that would need a
data set's name. Whatever comes from a file is escaped, as names of metrics or models
may hold anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt.hub.content.loss_curve import Points, thinned
from converters.lazy_pattern import LazyPattern
from converters.peft import kinds
from converters.words import counted, with_article

PICTURE = "loss.png"
MAX_CHARACTERS = 120  # characters of a name
ROWS = 8  # of a table of losses
_MARKS = LazyPattern(r"([\\`*_{}\[\]()#|~$:@]|(?<=www)\.)", re.IGNORECASE)
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
    """The card of a model with these facts (``facts.of_model`` and more),
    the same for the same.

    ``picture`` is the name of a picture of the losses; without one they are in a
    table.
    """
    from huggingface_hub import ModelCardData

    card_data = ModelCardData(
        base_model=facts.get("base_model"),
        library_name=facts.get("library_name"),
        pipeline_tag=facts.get("pipeline_tag"),
        tags=["deepspeed", "ckpt"],
    )
    front_matter = card_data.to_yaml(line_break="\n").strip()

    return "\n".join(
        ["---", front_matter, "---", "", *_body(facts, training, evaluation, picture)]
    ).encode()


def _body(
    facts: Mapping[str, Any], training: Points, evaluation: Points, picture: str | None
) -> Iterator[str]:
    repo_name = facts.get("repo")
    model_name = repo_name.rpartition("/")[2] if repo_name else facts["checkpoint"]
    yield f"# {plain(model_name)}"
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
    yield from ("## How the weights were made", "", _origin(facts), "")
    for line in facts.get("checks", ()):
        yield f"- {line}"
    yield ""


def _table(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts.get("base_model"):
        base_model = facts["base_model"]
        yield "base model", f"[{plain(base_model)}](https://hf.co/{base_model})"
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

    series = (("training loss", training), ("evaluation loss", evaluation))
    for loss_name, points in series:
        if points:
            yield from (f"| step | {loss_name} |", "|---|---|")
            for step, loss in thinned(points, ROWS):
                yield f"| {_number(step)} | {_number(loss)} |"
            yield ""


def _loading(facts: Mapping[str, Any]) -> Iterator[str]:
    """Python that loads the model; the repository's name is checked by whoever gave it."""
    repo_arguments = f'"{facts.get("repo") or "org/name"}"'
    if facts.get("revision"):
        repo_arguments += f", revision={facts['revision']!r}"
    task = facts.get("pipeline_tag")
    if facts.get("library_name") == "peft":
        class_name = "AutoPeftModel"
        if task == "text-generation":
            class_name = "AutoPeftModelForCausalLM"

        yield from (
            f"from peft import {class_name}",
            "",
            f"model = {class_name}.from_pretrained({repo_arguments})",
        )
        return

    if facts.get("library_name") != "transformers":
        yield from (
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({repo_arguments})  # safetensors files; the "
            "model's code is yours",
        )
        return

    class_name = _AUTO.get(task or "", "AutoModel")
    trust_argument = ", trust_remote_code=True" if facts.get("code") else ""
    yield from (
        f"from transformers import {class_name}",
        "",
        f'model = {class_name}.from_pretrained({repo_arguments}, dtype="auto"{trust_argument})',
    )


def _origin(facts: Mapping[str, Any]) -> str:
    tool = f"ckpt {plain(facts['ckpt'])}"
    if "stage" not in facts:
        return f"Published by {tool} as they were stored, unchanged."
    if facts["stage"] is None and not facts.get("saved_as"):
        type_words = "unchanged" if facts["dtype"] == "keep" else f"to {facts['dtype']}"
        return f"Converted by {tool} from files of torch.save to safetensors, {type_words}."

    zero_stage = "DeepSpeed without ZeRO"
    if facts.get("stage"):
        zero_stage = f"ZeRO stage {facts['stage']}"

    deepspeed_version = (
        f" (DeepSpeed {plain(facts['deepspeed'])})" if facts.get("deepspeed") else ""
    )
    rank_count = counted(facts["world_size"], "rank")
    type_words = (
        "each in the type it is stored in" if facts["dtype"] == "keep" else f"to {facts['dtype']}"
    )
    how_made = "Converted"
    if facts.get("kind") == "merged":
        how_made = (
            f"{plain(kinds.title(facts['adapter'] or 'PEFT'))} adapter merged into its base model"
        )

    training = (
        f"the checkpoint of a training in {plain(facts['precision'])} with "
        f"{zero_stage}{deepspeed_version} on {rank_count}"
    )
    if facts.get("saved_as"):
        training = (
            f"{with_article(facts['saved_as'])}, of a training in {plain(facts['precision'])} on "
            f"{rank_count}"
        )
    return f"{how_made} by {tool} from {training}, {type_words}."


def plain(text: object) -> str:
    """Text that markdown and HTML take for nothing but text: one line,
    of bounded length."""
    one_line = " ".join(
        "".join(character if character.isprintable() else " " for character in str(text)).split()
    )
    one_line = (
        one_line if len(one_line) <= MAX_CHARACTERS else one_line[: MAX_CHARACTERS - 3] + "..."
    )
    return html.escape(_MARKS.sub(r"\\\1", one_line), quote=False)


def _number(value: Any) -> str:
    """A number of at most six digits; "nan" and the like as they are."""
    return f"{value:.6g}" if isinstance(value, (int, float)) else plain(value)
