"""transformers answers from a warm process, and what it answers is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from warm_transformers import WarmTransformers

from ckpt.weights.reader import installed

_answers: dict[str, dict[str, Any]] = {}
_ask = installed.ask


def remembered(config: Mapping[str, Any], cls: str | None = None) -> dict[str, Any]:
    """``installed.ask``, which is asked once for each configuration and class."""
    question = json.dumps([config, cls, installed._CHILD], sort_keys=True)
    if question not in _answers:
        _answers[question] = _ask(config, cls)  # a refusal is raised, and not remembered
    return dict(_answers[question])


@pytest.fixture(autouse=True)
def _transformers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "subprocess", WarmTransformers())
    monkeypatch.setattr(installed, "ask", remembered)


@pytest.fixture(scope="session")
def universal_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The universal folder of a fixture, which is made once; who changes it takes a copy."""
    from ckpt.rewrite import universal

    @cache
    def make(source: Path) -> Path:
        output = tmp_path_factory.mktemp("universal") / "u"
        universal.execute(universal.plan_to(source, output=output))
        return output

    return make
