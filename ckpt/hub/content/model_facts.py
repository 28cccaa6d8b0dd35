"""The known facts of the model in a checkpoint: for ``--json``, and for its card.

All values are JSON. Names and numbers come from files that others wrote, so whoever
prints them has to escape them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.hub.content.allow_list import read_object
from ckpt.hub.content.loss_curve import Points
from ckpt.runs.fields import json_number
from ckpt.runs.run import RunCheckpoint
from ckpt.version import __version__
from ckpt.weights import quantized_facts
from ckpt.weights.conversion.task import Conversion
from converters.accessors import is_number
from converters.detect.kinds import BY_NAME
from converters.lazy_pattern import LazyPattern
from converters.source import Source
from converters.words import counted, verb

_HUB_ID = LazyPattern(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TASKS = {  # ends of class names that stand for one task alone (transformers 5.23)
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
MAX_NUMBER = 1e300  # of a number, so that it can be printed and drawn
# ends of what the Trainer logs beside metrics
_SPEEDS = ("_runtime", "_per_second", "_time")


def of_model(
    checkpoint: RunCheckpoint, model_root: Path, adapter_text: bytes | None = None
) -> dict[str, Any]:
    """Facts that do not depend on how the weights are sent;
    ``model_root`` has config.json.

    ``adapter_text`` is the configuration of an adapter that is sent, where it is not
    that in ``model_root``. ``None`` stands for what is not known.
    """
    model_config, adapter = (
        read_object(model_root, "config.json"),
        read_object(model_root, "adapter_config.json"),
    )
    adapter = json.loads(adapter_text) if adapter_text else adapter
    trainer_state = read_object(model_root, "trainer_state.json")
    progress = checkpoint.manifest.progress if checkpoint.manifest else {}
    step = (
        checkpoint.step
        if checkpoint.step is not None
        else _number(trainer_state.get("global_step"))
    )
    classes = model_config.get("architectures")
    architecture = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    model_type = model_config.get("model_type")
    library = "peft" if adapter else "transformers" if isinstance(model_type, str) else None
    architecture = architecture if isinstance(architecture, str) else None

    return {
        "checkpoint": checkpoint.name,
        "step": step,
        "epoch": _number(trainer_state.get("epoch", progress.get("epoch"))),
        "model_type": model_type if isinstance(model_type, str) else None,
        "architecture": architecture,
        "library_name": library,
        "adapter": adapter["peft_type"] if isinstance(adapter.get("peft_type"), str) else None,
        "base_model": _base_model(model_root, model_config, adapter),
        "pipeline_tag": _task(architecture, adapter),
        "metrics": {
            metric_name: json_number(metric)
            for metric_name, metric in _metrics(checkpoint, trainer_state, step).items()
        },
        "ckpt": __version__,
    }


def of_merged(facts: Mapping[str, Any], config_text: bytes | None) -> dict[str, Any]:
    """The facts of a model that an adapter was merged into,
    by the config.json that is sent."""
    model_config = json.loads(config_text) if config_text else {}
    classes = model_config.get("architectures")
    architecture = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    architecture = architecture if isinstance(architecture, str) else None
    model_type = model_config.get("model_type")

    return {
        **facts,
        "model_type": model_type if isinstance(model_type, str) else None,
        "architecture": architecture,
        "library_name": "transformers" if isinstance(model_type, str) else None,
        "pipeline_tag": _task(architecture, {}),
    }


def _form(source: Source) -> str | None:
    """What states of a training are, other than DeepSpeed's;
    ``None`` for those and weights."""
    if source.topology is None or source.stage is not None:
        return None
    return BY_NAME[source.kind].title


def of_conversion(conversion: Conversion) -> dict[str, Any]:
    """How the weights are made from the ZeRO states,
    and what of them is proven meanwhile."""
    source, plan = conversion.checkpoint, conversion.plan
    weights = conversion.product.weights
    parameters = quantized_facts.parameters(weights)
    coverage_line = "Every element of the flat partitions is used once, or is padding."
    is_unpartitioned = not source.stage
    checks = [] if is_unpartitioned else [coverage_line]
    unchecked_count = sum(checksum.crc32 is None for checksum in plan.checksums)
    if plan.checksums and not unchecked_count:
        checks.append("Every byte read equals the CRC32 that its file keeps of it.")
    elif len(plan.checksums) > unchecked_count:
        checks.append("Bytes read equal their file's CRC32s; some records carry none.")

    compared_count = sum(bool(placement.copies) for placement in plan.placements())
    if compared_count and conversion.strict and conversion.proof:
        equality = verb(compared_count, "equals its copy", "equal the copies")
        checks.append(
            f"{counted(compared_count, 'tensor')}, rounded, {equality} in {conversion.proof}."
        )

    return {
        "dtype": conversion.dtype,
        "parameters": parameters,
        "total_size": plan.total_size,
        "stage": source.stage,
        "saved_as": _form(source),
        "world_size": source.world_size,
        "precision": source.precision,
        "deepspeed": source.version,
        "absent": dict(weights.absent),
        "checks": checks,
        "notes": list(conversion.notes),
    }


def losses(model_root: Path) -> tuple[Points, Points]:
    """The losses that the Trainer logged, by step: of training and of evaluation."""
    log_history = read_object(model_root, "trainer_state.json").get("log_history")
    entries = (
        [entry for entry in log_history if isinstance(entry, dict)]
        if isinstance(log_history, list)
        else []
    )

    return _series(entries, "loss"), _series(entries, "eval_loss")


def _series(entries: list[dict[str, Any]], name: str) -> Points:
    pairs = [(_number(entry.get("step")), _number(entry.get(name))) for entry in entries]
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def _number(value: Any) -> Any:
    """A finite number as it is, else ``None``; JSON has whole numbers of any length."""
    return value if is_number(value) and abs(value) < MAX_NUMBER else None


def _metrics(
    checkpoint: RunCheckpoint, trainer_state: dict[str, Any], step: Any
) -> Mapping[str, float]:
    """The manifest's; without any, what the Trainer's evaluation at this step logged."""
    metrics = dict(checkpoint.metrics)
    log_history = trainer_state.get("log_history")
    for entry in log_history if isinstance(log_history, list) and not metrics else ():
        if isinstance(entry, dict) and entry.get("step") == step:
            evaluated = {
                metric_name: metric
                for metric_name, metric in entry.items()
                if metric_name.startswith("eval_")
            }
            metrics |= {
                metric_name: metric
                for metric_name, metric in evaluated.items()
                if _number(metric) is not None
            }

    printable = {
        metric_name: metric
        for metric_name, metric in metrics.items()
        if not isinstance(metric, int) or abs(metric) < MAX_NUMBER
    }

    return {
        metric_name: value
        for metric_name, value in printable.items()
        if not metric_name.endswith(_SPEEDS)
    }


def _base_model(
    model_root: Path, model_config: dict[str, Any], adapter: dict[str, Any]
) -> str | None:
    """The model that training began with,
    where its name is one of the Hub and of no folder."""
    base_name = model_config.get("_name_or_path")
    if adapter:
        base_name = adapter.get("base_model_name_or_path")
    if not isinstance(base_name, str):
        return None
    if not _HUB_ID.fullmatch(base_name) or ".." in base_name:
        return None

    short_name = base_name.rpartition("/")[2]
    if re.fullmatch(r"(checkpoint|weights)-\d+|global_step\d+", short_name):
        return None

    local_folders = (Path.cwd(), model_root, *model_root.absolute().parents)

    is_folder = any((folder / base_name).exists() for folder in local_folders)

    return None if is_folder else base_name


def _task(architecture: str | None, adapter: dict[str, Any]) -> str | None:
    if adapter:
        return "text-generation" if adapter.get("task_type") == "CAUSAL_LM" else None
    tasks = (
        task for ending, task in _TASKS.items() if architecture and architecture.endswith(ending)
    )
    return next(tasks, None)
