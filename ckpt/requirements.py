"""The oldest versions of other libraries that the front ends were run with.

``scripts/matrix`` runs them, docs/versions.md has the table, and the extras of
pyproject.toml say the same (``tests/unit/test_requirements.py``). With an older one a
training would save nothing and end well, or fail at its first save; so a front end asks
here before it imports anything.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from converters.errors import CheckpointError

log = logging.getLogger("ckpt")

OLDEST = {
    "accelerate": "1.0",
    "deepspeed": "0.16",
    "huggingface_hub": "0.30",
    "lightning": "2.5",
    "pytorch_lightning": "2.5",
    "transformers": "4.51",
}

# What no front end asks for: a training may have it.
OLDEST_BESIDES = {"peft": "0.14", "torch": "2.4"}
OLDEST_TORCH_OF_RESUME = "2.6"  # by the Trainer

_old_libraries: set[str] = set()  # libraries that this process has warned of


def require(work: str, *libraries: str) -> None:
    """``CheckpointError`` where one is not installed, or too old for ``work``.

    A copy of a source tree says no version, and is taken.
    """
    if "deepspeed" in libraries:
        require_torch(work)
    for library in libraries:
        oldest = OLDEST[library]
        try:
            release = version(library)
        except PackageNotFoundError:
            if find_spec(library) is not None:
                continue
            release = ""

        if numbers(release) < numbers(oldest):
            present = f"{release} is installed" if release else "it is not installed"
            raise CheckpointError(
                f"{work} needs {library} {oldest} or newer, and {present}; "
                f"pip install '{library}>={oldest}'",
                "unsupported",
            )


def require_if_installed(work: str, library: str) -> None:
    """``CheckpointError`` where a library that ``work`` may do without is there,
    and too old."""
    if find_spec(library) is not None:
        require(work, library)


def warn_of_old_torch() -> None:
    """Logs, on rank 0, that the Trainer cannot resume with the torch that is installed.

    Saves are whole all the same. transformers reads the random states with
    ``torch.load(weights_only=True)``, which refuses numpy's arrays before torch 2.6
    (transformers 4.51 ``trainer.py: safe_globals``), or refuses that torch by itself
    (transformers 5.24 ``import_utils.py: check_torch_load_is_safe``).
    """
    try:
        release = version("torch")
    except PackageNotFoundError:
        return

    is_old = numbers(release) < numbers(OLDEST_TORCH_OF_RESUME)
    if is_old and os.environ.get("RANK", "0") == "0":
        log.warning(
            "torch %s: the Trainer saves with it and cannot resume, because it does not load its "
            "own random states before torch %s; resume with that or a newer one",
            release,
            OLDEST_TORCH_OF_RESUME,
        )


def warn_of_old(releases: Mapping[str, str]) -> None:
    """Logs, on rank 0 and once a process, which of a training's libraries are older
    than any that ckpt was run with; ``releases`` are their versions by name.

    ``ckpt.Saver`` may well work with them.
    """
    bounds = {**OLDEST, **OLDEST_BESIDES}
    is_first = os.environ.get("RANK", "0") == "0"
    for library, release in releases.items():
        oldest = bounds.get(library)
        if oldest is None or library in _old_libraries or numbers(release) >= numbers(oldest):
            continue

        _old_libraries.add(library)
        if is_first:
            log.warning(
                "%s %s is older than %s, the oldest that ckpt was run with; install a newer one, "
                "or make sure that a checkpoint of yours can be resumed from and converted",
                library,
                release,
                oldest,
            )


def is_of_torch(error: ModuleNotFoundError) -> bool:
    """Whether it is torch that an import did not find."""
    return (error.name or "").partition(".")[0] == "torch"


def require_torch(work: str) -> None:
    """``CheckpointError`` where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise without_torch(work) from error


class WithoutTorchError(CheckpointError, AttributeError):
    """That torch is not installed: ``hasattr(ckpt, "live")`` is false then."""


def without_torch(work: str) -> CheckpointError:
    """The error for ``work`` where torch is not installed."""
    return WithoutTorchError(
        f"{work} needs torch, and it is not installed; pip install torch", "unsupported"
    )


def numbers(release: str) -> tuple[int, ...]:
    """The numbers of a version, by which two are compared: (4, 57) of "4.57.0.dev0".

    Zeros at the end do not count; neither does what follows the numbers.
    """
    match = re.match(r"\d+(?:\.\d+)*", release)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and not parts[-1]:
        parts.pop()

    return tuple(parts)
