"""Modules that PEFT would adapt by a configuration,
and that no tensor of the adapter is of.

Source: PEFT 0.21.2 ``inject_adapter`` in ``tuners/tuners_utils.py``: every module whose
name is a target gets an adapter, and a model that is loaded without tensors for it has a
new one there.
"""

from __future__ import annotations

from collections.abc import Iterable

from converters.peft import config_fit, expected_layers
from converters.peft.config import AdapterConfig
from converters.peft.expected_layers import TrainedLayers

# Of these a layer with a matrix, or with a kernel, is adapted whatever else it is.
_OF_MATRICES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT")
_MOST = 5_000  # modules that are compared with a pattern


def unadapted(
    config: AdapterConfig,
    trained: TrainedLayers,
    modules: Iterable[str],
) -> list[str]:
    """The targets among ``modules``,
    which have matrices, without a tensor of the adapter.

    Which ones are targets is told of names and of a pattern; "all-linear" goes by
    classes.
    """
    if not _told_by_names(config):
        return []

    targets = config.target_modules
    assert targets is not None
    adapted = frozenset(trained.modules)
    others = [module for module in modules if module not in adapted]
    if isinstance(targets, str) and len(others) > _MOST:
        return []

    return [
        module
        for module in others
        if config_fit.is_target(targets, module)
        and expected_layers.left_out(config, module) is None
        and not any(
            module == saved_module or module.startswith(f"{saved_module}.")
            for saved_module in trained.saved
        )
    ]


def unmatched(config: AdapterConfig, trained: TrainedLayers) -> list[str]:
    """The targets that no adapted module has the name of."""
    targets = config.target_modules
    if not _told_by_names(config) or targets is None or isinstance(targets, str):
        return []
    return [
        target
        for target in sorted(targets)
        if not any(config_fit.is_target((target,), module) for module in trained.modules)
    ]


def _told_by_names(config: AdapterConfig) -> bool:
    if config.target_modules in (None, "all-linear") or config.values.get("target_parameters"):
        return False
    return config.peft_type in _OF_MATRICES
