"""Where the configuration of an adapter lies: it is found or asked for, never invented.

    --adapter-config FILE|DIR
    the checkpoint's folder, the tag's folder
    the run: the folder that the checkpoint lies in, and the checkpoints beside it, if all agree

That of the run counts only if it fits the tensors; one that the user names, or that
lies in the checkpoint, and does not fit, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckpt.weights import advice
from ckpt.weights.request import Request
from converters import words
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import ADAPTER_CONFIG
from converters.peft import config as configs
from converters.peft import config_fit
from converters.peft.config import NAME, AdapterConfig
from converters.peft.config_fit import Shown
from converters.peft.names import DEFAULT as DEFAULT
from converters.source import Place
from converters.storage import stores

MAX_SIBLINGS = 1000  # checkpoints of a run that are looked into
# what is in no tensor of a kind, and is needed for its weights (PEFT 0.21)
_UNTOLD = {
    "LORA": "lora_alpha",
    "ADALORA": "lora_alpha",
    "LOHA": "alpha",
    "LOKR": "alpha",
    "IA3": "feedforward_modules",
}
_CHECKPOINT = LazyPattern(r"(checkpoint|epoch|step|global_step|iter|weights)[-_]?\d.*|final|last")


def places(folder: Path, adapter: str, alone: bool) -> tuple[Path, ...]:
    """The places where PEFT may have saved an adapter's files, the likeliest first.

    The adapter ``default`` lies in the folder itself, others lie in folders of their
    own. An adapter that is ``alone`` may lie in the folder under any name.
    """
    if adapter == DEFAULT:
        return (folder,)

    return (folder / adapter, folder) if alone else (folder / adapter,)


def likely(
    place: Place, request: Request, adapter: str, evidence: Shown, alone: bool = True
) -> AdapterConfig | None:
    """As ``configuration``, but ``None`` where that is not found or does not fit."""
    try:
        return configuration(place, request, adapter, evidence, alone)
    except CheckpointError:
        return None


def configuration(
    place: Place, request: Request, adapter: str, evidence: Shown, alone: bool = True
) -> AdapterConfig:
    """The configuration that is the adapter's; ``alone`` is whether it is the only one.

    ``CheckpointError`` (incomplete) where none is found; it names the option to give
    one. Also where the configuration that the user names, or that lies in the
    checkpoint, does not fit the tensors.
    """
    path = _own_path(place, request, adapter, alone)
    if path is not None:
        config = configs.read(path)
        misfit = config_fit.misfit(config, evidence)
        if misfit is not None:
            raise CheckpointError(
                f"{config.path} is not the configuration of the adapter in "
                f"{place.folder}: {misfit}; give the right one with {ADAPTER_CONFIG}",
                "refused",
            )

        return config

    run_configs = [
        config
        for config in _beside(place.root, adapter, alone)
        if not config_fit.misfit(config, evidence)
    ]
    if run_configs and _agree(run_configs):
        return run_configs[0]

    raise CheckpointError(_question(place, adapter, evidence, run_configs), "incomplete")


def _own_path(place: Place, request: Request, adapter: str, alone: bool) -> Path | None:
    """The file that the user names, or that lies in the checkpoint."""
    option = request.adapter_config
    if option is not None:
        if not stores.is_folder(option):
            return option
        return _first(places(option, adapter, True)) or option / NAME

    for folder in dict.fromkeys((place.root, place.folder)):
        path = _first(places(folder, adapter, alone))
        if path is not None:
            return path

    return None


def _first(folders: tuple[Path, ...]) -> Path | None:
    """The first of the folders' files that is there."""
    return next((folder / NAME for folder in folders if stores.is_file(folder / NAME)), None)


def _beside(root: Path, adapter: str, alone: bool) -> Iterator[AdapterConfig]:
    """Configurations in the run of the checkpoint; unreadable ones do not count.

    The run is the folder around the checkpoint. Folders there whose names are not those
    of checkpoints may be of another run.
    """
    run = root.resolve().parent
    try:
        entries = [run / name for name in stores.names(run) if _CHECKPOINT.fullmatch(name)]
    except OSError:
        return

    for folder in (run, *entries[:MAX_SIBLINGS]):
        path = _first(places(folder, adapter, alone))
        if folder == root.resolve() or path is None:
            continue

        try:
            yield configs.read(path)
        except CheckpointError:
            continue


def _agree(configurations: list[AdapterConfig]) -> bool:
    """Whether all say the same; sets are written in any order."""
    first = _ordered(configurations[0])
    return all(_ordered(config) == first for config in configurations[1:])


def _ordered(config: AdapterConfig) -> dict[str, object]:
    unordered = (
        "target_modules",
        "modules_to_save",
        "exclude_modules",
        "feedforward_modules",
    )
    values = dict(config.values)
    for name in unordered:
        value = values.get(name)
        if isinstance(value, list):
            values[name] = sorted(map(str, value))

    return values


def _question(place: Place, adapter: str, evidence: Shown, run_configs: list[AdapterConfig]) -> str:
    """The line that asks for the configuration, with what the checkpoint shows."""
    adapter_text = "" if adapter == DEFAULT else f" {adapter!r}"
    target_text = f" on {evidence.targets}" if evidence.modules else ""
    situation = (
        f"{place.root} holds {words.with_article(evidence.title)}{adapter_text}{target_text}"
    )
    if run_configs:
        paths = words.some((str(config.path) for config in run_configs), words.LONG_LIST)
        return (
            f"{situation}, and {paths} differ; name the right {NAME} with {ADAPTER_CONFIG('FILE')}"
        )

    example = _UNTOLD.get(evidence.peft_type or "")
    example_text = "" if example is None else f", such as {example}"
    return (
        f"{situation}, and no {NAME} that fits lies in it or in the run's folder; no "
        f"tensor holds the values of that file{example_text}: name the file or its "
        f"folder with {ADAPTER_CONFIG('PATH')}; {advice.tensors_as_stored()}"
    )
