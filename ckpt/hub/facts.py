"""What is known of the model in a checkpoint: for ``--json``, and for its card.

All values are JSON. Names and numbers come from files that others wrote, so whoever prints them
has to escape them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt import __version__
from ckpt.convert import Conversion
from ckpt.hub.allowed import read_object
from ckpt.hub.curve import Points
from ckpt.runs.manifest import written
from ckpt.runs.run import Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TASKS = {  # ends of class names that stand for one task alone (transformers 5.23)
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
LARGEST = 1e300  # of a number, so that it can be printed and drawn
_SPEEDS = ("_runtime", "_per_second", "_time")  # ends of what the Trainer logs beside metrics


def of_model(checkpoint: Checkpoint, root: Path) -> dict[str, Any]:
    """Facts that do not depend on how the weights are sent; ``root`` has config.json.

    ``None`` stands for what is not known.
    """
    config, adapter = read_object(root, "config.json"), read_object(root, "adapter_config.json")
    state = read_object(root, "trainer_state.json")
    progress = checkpoint.manifest.progress if checkpoint.manifest else {}
    step = checkpoint.step if checkpoint.step is not None else _number(state.get("global_step"))
    classes = config.get("architectures")
    architecture = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    model_type = config.get("model_type")
    library = "peft" if adapter else "transformers" if isinstance(model_type, str) else None
    architecture = architecture if isinstance(architecture, str) else None
    return {
        "checkpoint": checkpoint.name,
        "step": step,
        "epoch": _number(state.get("epoch", progress.get("epoch"))),
        "model_type": model_type if isinstance(model_type, str) else None,
        "architecture": architecture,
        "library_name": library,
        "adapter": adapter["peft_type"] if isinstance(adapter.get("peft_type"), str) else None,
        "base_model": _base_model(root, config, adapter),
        "pipeline_tag": _task(architecture, adapter),
        "metrics": {n: written(v) for n, v in _metrics(checkpoint, state, step).items()},
        "ckpt": __version__,
    }


def of_conversion(conversion: Conversion) -> dict[str, Any]:
    """How the weights are made from the ZeRO states, and what of them is proven meanwhile."""
    source, plan = conversion.checkpoint, conversion.plan
    weights = source.weights
    parameters = sum(r.numel for n, r in weights.tensors.items() if n not in weights.buffers)
    covered = "Every element of the flat partitions is used once, or is padding."
    plain = source.stage == 0
    checks = [] if plain else [covered]
    without = sum(checksum.crc32 is None for checksum in plan.checksums)
    if plan.checksums and not without:
        checks.append("Every byte read equals the CRC32 that its file keeps of it.")
    elif len(plan.checksums) > without:
        checks.append("Bytes read equal their file's CRC32s; some records carry none.")
    compared = sum(placement.copy is not None for placement in plan.placements())
    if compared and conversion.strict and conversion.proof:
        checks.append(f"{compared} tensors, rounded, equal the copies in {conversion.proof}.")
    return {
        "dtype": conversion.dtype,
        "parameters": parameters,
        "total_size": plan.total_size,
        "stage": source.stage,
        "world_size": source.world_size,
        "precision": source.precision,
        "deepspeed": source.version,
        "absent": dict(weights.absent),
        "checks": checks,
        "notes": list(conversion.notes),
    }


def losses(root: Path) -> tuple[Points, Points]:
    """The losses that the Trainer logged, by step: of training and of evaluation."""
    log = read_object(root, "trainer_state.json").get("log_history")
    entries = [e for e in log if isinstance(e, dict)] if isinstance(log, list) else []
    return _series(entries, "loss"), _series(entries, "eval_loss")


def _series(entries: list[dict[str, Any]], name: str) -> Points:
    pairs = [(_number(entry.get("step")), _number(entry.get(name))) for entry in entries]
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def _number(value: Any) -> Any:
    """A finite number as it is, else ``None``; JSON has whole numbers of any length."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if real and abs(value) < LARGEST else None


def _metrics(checkpoint: Checkpoint, state: dict[str, Any], step: Any) -> Mapping[str, float]:
    """The manifest's; without any, what the Trainer's evaluation at this step logged."""
    found = dict(checkpoint.metrics)
    log = state.get("log_history")
    for entry in log if isinstance(log, list) and not found else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            evaluated = {n: v for n, v in entry.items() if n.startswith("eval_")}
            found |= {n: v for n, v in evaluated.items() if _number(v) is not None}
    shown = {n: v for n, v in found.items() if not isinstance(v, int) or abs(v) < LARGEST}
    return {name: value for name, value in shown.items() if not name.endswith(_SPEEDS)}


def _base_model(root: Path, config: dict[str, Any], adapter: dict[str, Any]) -> str | None:
    """The model that training began with, where its name is one of the Hub and of no folder."""
    named = adapter.get("base_model_name_or_path") if adapter else config.get("_name_or_path")
    if not isinstance(named, str) or not _HUB_ID.fullmatch(named) or ".." in named:
        return None
    last = named.rpartition("/")[2]
    if re.fullmatch(r"(checkpoint|weights)-\d+|global_step\d+", last):
        return None
    here = (Path.cwd(), root, *root.absolute().parents)
    return None if any((folder / named).exists() for folder in here) else named


def _task(architecture: str | None, adapter: dict[str, Any]) -> str | None:
    if adapter:
        return "text-generation" if adapter.get("task_type") == "CAUSAL_LM" else None
    ends = (task for end, task in _TASKS.items() if architecture and architecture.endswith(end))
    return next(ends, None)
