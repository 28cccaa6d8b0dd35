"""What ``ckpt`` relies on in DeepSpeed: it is there, and only ``ckpt/engine`` knows of it."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from paths import ROOT
from syntax_trees import nodes

from ckpt.engine import attributes, partitions, view
from ckpt.engine.view import EngineView, Internals, TrainingEngine
from ckpt.saving import saved_training
from converters.errors import CheckpointError

NAMES = {attribute.name for attribute in attributes.relied_on()}
# What every front end may ask of an engine.
OF_THE_VIEW = {
    name
    for protocol in (EngineView, TrainingEngine)
    for name in (*vars(protocol), *protocol.__annotations__)
}
# Names that much else has as well; they are DeepSpeed's only where an engine is asked.
COMMON = {
    *("config", "device", "save", "load", "commit", "create", "makedirs", "status"),
    *("overflow", "scale_factor", "grid", "optimizer", "zero_config"),
    *("gradient_accumulation_steps", "lr_scheduler", "_save_checkpoint", "train_batch_size"),
    *("partitions", "key"),
}
ENGINES = {"engine", "first", "deepspeed_engine", "model_wrapped", "optimizer"}
ASKING = {"getattr", "hasattr", "setattr", "delattr"}
# Attributes of optimizers of torch and bitsandbytes.
OF_TORCH = {"param_groups", "state", "state_dict", "load_state_dict", "defaults", "name2qmap"}

# Of schedulers of torch and Accelerate, models of transformers and PEFT, loaders and scalars.
OF_OTHERS = {
    *("_last_lr", "base_lrs", "_schedulers", "_get_closed_form_lr", "scheduler", "split_batches"),
    *("save_pretrained", "to_dict", "peft_config", "dataset", "get_sampler", "item"),
    *("name", "sharding"),  # of an enumeration, and of our own PlainView
}


def other_rooms() -> list[Path]:
    folder = ROOT / "ckpt/engine"
    return sorted(path for path in (ROOT / "ckpt").rglob("*.py") if folder not in path.parents)


def accesses(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, receiver and name of each attribute that a module reads, sets or asks for."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            yield node.lineno, last_name(node.value), node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ASKING:
            receiver, name, *_ = node.args
            if isinstance(name, ast.Constant):
                yield node.lineno, last_name(receiver), str(name.value)


def last_name(receiver: ast.expr) -> str:
    """The last part of what an attribute is asked of: "engine" of ``self.engine``."""
    if isinstance(receiver, ast.Attribute):
        return receiver.attr
    if isinstance(receiver, ast.Call):
        return last_name(receiver.func).removeprefix("_")
    return receiver.id if isinstance(receiver, ast.Name) else ""


@pytest.mark.oracle  # it imports DeepSpeed
def test_the_installed_deepspeed_has_every_attribute() -> None:
    assert [str(attribute) for attribute in attributes.missing(optional=True)] == []
    attributes.require()


def test_the_version_that_was_read_is_the_one_that_is_tested() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"deepspeed=={attributes.VERSION}"' in pyproject


@pytest.mark.oracle
def test_what_an_upgrade_drops_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = attributes._package()
    for file in {attribute.file for attribute in attributes.relied_on()}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, tmp_path / file)

    constants = tmp_path / "checkpoint/constants.py"
    constants.write_text(constants.read_text().replace("'universal_checkpoint_info'", "'cuts'"))
    stage3 = tmp_path / "runtime/zero/stage3.py"
    text = stage3.read_text()
    for name in ("fp32_partitioned_groups_flat", "use_muon"):
        text = text.replace(name, f"{name}_renamed")
    stage3.write_text(text)
    (tmp_path / "runtime/pipe/topology.py").unlink()

    expected = [
        "DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat (runtime/zero/stage3.py)",
        *(
            f"PipelineParallelGrid.{name} (runtime/pipe/topology.py)"
            for name in (
                "get_pipe_parallel_world_size",
                "get_stage_id",
                "get_slice_parallel_rank",
                "get_slice_parallel_world_size",
            )
        ),
        "universal_checkpoint_info (checkpoint/constants.py)",
    ]
    assert list(map(str, attributes.missing(tmp_path))) == expected
    assert "use_muon" in str(list(map(str, attributes.missing(tmp_path, optional=True))))

    monkeypatch.setattr(attributes, "_package", lambda: tmp_path)
    with pytest.raises(CheckpointError, match=r"does not define DeepSpeedZeroOptimizer_Stage3\."):
        attributes.require()

    attributes.require_of_other_version.cache_clear()
    attributes.require_of_other_version()  # which reads none of these files
    attributes.require_of_other_version.cache_clear()
    monkeypatch.setattr(attributes, "version", lambda _: "0.20.0")
    engine = SimpleNamespace(module=None, zero_optimization_stage=int)
    with pytest.raises(CheckpointError, match="does not define"):
        saved_training.require_either(engine, None, None, None)
    attributes.require_of_other_version.cache_clear()


def test_no_other_room_knows_deepspeeds_attributes() -> None:
    private = NAMES - OF_THE_VIEW
    known = [
        f"{path.relative_to(ROOT)}:{line}: {receiver}.{name}"
        for path in other_rooms()
        for line, receiver, name in accesses(path)
        if name in private - COMMON or (receiver in ENGINES and name in private)
    ]
    assert known == []


def test_no_other_room_names_what_deepspeed_sets_on_a_model_or_imports_it() -> None:
    known = []
    for path in other_rooms():
        for node in nodes(path):
            if isinstance(node, ast.Constant) and str(node.value).startswith(("ds_", "_ds_")):
                known.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                known += [f"{path.relative_to(ROOT)}: {name}" for name in names if of_ds(name)]
            elif isinstance(node, ast.ImportFrom) and of_ds(node.module or ""):
                known.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}")

    assert known == []


def of_ds(module: str) -> bool:
    return module.partition(".")[0] == "deepspeed"


def test_an_engine_has_a_type_where_it_is_taken() -> None:
    """``Any`` for an engine would let every room ask it for everything."""
    untyped = []
    for path in sorted((ROOT / "ckpt").rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.arg) and node.arg in {"engine", "engines"}:
                annotation = "" if node.annotation is None else ast.unparse(node.annotation)
                if re.search(r"\bAny\b", annotation) or not annotation:
                    untyped.append(f"{path.relative_to(ROOT)}:{node.lineno}: {annotation}")

    assert untyped == []


def test_what_the_room_alone_asks_is_in_the_table() -> None:
    members = {*Internals.__annotations__} - {*TrainingEngine.__annotations__}
    of_engine = {a.name for a in attributes.relied_on() if a.file == "runtime/engine.py"}
    assert members - of_engine == set()


def test_what_the_room_asks_of_an_engine_is_in_the_table() -> None:
    unknown = [
        f"{path.name}:{line}: {receiver}.{name}"
        for path in sorted((ROOT / "ckpt/engine").rglob("*.py"))
        for line, receiver, name in accesses(path)
        if receiver in {"engine", "internals", "optimizer", "inner_optimizer"}
        and name not in NAMES | OF_THE_VIEW | OF_TORCH
    ]
    assert unknown == []


def names_asked_for(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, call and name of what ``getattr`` and the like ask for by a name of the module.

    A name is a text, a constant, or what a loop takes from such: the module itself says what it is.
    """
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for function in nodes(path):
        if not isinstance(function, ast.FunctionDef):
            continue

        names_by_target: dict[str, set[str]] = {}
        for node in ast.walk(function):
            if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
                names_by_target.setdefault(node.target.id, set()).update(texts(node.iter, module))

        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ASKING:
                names = texts(node.args[1], module)
                if isinstance(node.args[1], ast.Name):
                    names |= names_by_target.get(node.args[1].id, set())
                for name in names:
                    yield node.lineno, ast.unparse(node), name


def texts(expression: ast.expr, module: ModuleType) -> set[str]:
    """The texts that an expression is in a module, one or several; none if it is of a function."""
    try:
        value = eval(ast.unparse(expression), dict(vars(module)))  # its own source
    except Exception:
        return set()
    values = [value] if isinstance(value, str) else value
    is_several = isinstance(values, (list, tuple, set, frozenset, Mapping))
    return {text for text in values if isinstance(text, str)} if is_several else set()


@pytest.mark.oracle  # it imports the rooms
def test_what_the_room_asks_for_by_name_is_in_the_table() -> None:
    """Of whatever object: DeepSpeed sets attributes of models and parameters, too."""
    unknown = [
        f"{path.name}:{line}: {call} ({name})"
        for path in sorted((ROOT / "ckpt/engine").rglob("*.py"))
        for line, call, name in names_asked_for(path)
        if name not in NAMES | OF_THE_VIEW | OF_TORCH | OF_OTHERS and not name.startswith("__")
    ]
    assert unknown == []


def test_the_table_has_nothing_that_is_not_used() -> None:
    texts = [
        path.read_text()
        for path in (ROOT / "ckpt/engine").rglob("*.py")
        if path.name != "attributes.py"
    ]
    unused = {name for name in NAMES if not any(name in text for text in texts)}
    assert unused == set()


def test_what_an_old_deepspeed_lacks_is_done_without_or_named() -> None:
    """DeepSpeed 0.16.0 tells nothing of NVMe; before 0.17 it gives no swapped part back."""
    engine: Any = SimpleNamespace()
    assert not view.offloads_optimizer_to_nvme(engine)
    with pytest.raises(CheckpointError, match=r"DeepSpeed 0\.17 or newer"):
        partitions._require_swapping(SimpleNamespace())
