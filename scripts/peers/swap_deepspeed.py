"""A plugin of pytest: DeepSpeed's engine saves or loads by ckpt, or its functions are ckpt's.

``PEERS_SWAP`` is "functions", "save" or "load"; anything else swaps nothing. DeepSpeed's tests run
in processes of their own, which import ``unit``: so that package of the copy imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

SWAP = os.environ.get("PEERS_SWAP", "")
STOCK: dict[str, Any] = {}  # the engine's own methods


def pytest_configure() -> None:
    """Makes the processes of the tests swap, too."""
    package = Path(os.environ["PEERS_FOLDER"], "unit/__init__.py")
    line = "import swap_deepspeed; swap_deepspeed.swap()\n"
    if line not in package.read_text():
        package.write_text(package.read_text() + line)
    swap()


def swap() -> None:
    """Swaps what ``PEERS_SWAP`` says."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import zero_to_fp32 as theirs

    from ckpt import zero_to_fp32 as ours

    if SWAP == "functions":
        for name in (
            "get_fp32_state_dict_from_zero_checkpoint",
            "convert_zero_checkpoint_to_fp32_state_dict",
            "convert_zero_checkpoint_to_state_dict",
            "load_state_dict_from_zero_checkpoint",
        ):
            setattr(theirs, name, getattr(ours, name))

    if not STOCK:
        for name in ("save_checkpoint", "load_checkpoint"):
            STOCK[name] = getattr(DeepSpeedEngine, name)
    if SWAP == "save":
        DeepSpeedEngine.save_checkpoint = save
        DeepSpeedEngine.load_checkpoint = of_newest(DeepSpeedEngine.load_checkpoint)
    elif SWAP == "load":
        DeepSpeedEngine.load_checkpoint = load


def save(
    engine: Any,
    save_dir: str,
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """``engine.save_checkpoint`` by ``ckpt.Saver``, whose tags are its own."""
    import ckpt

    options = {"exclude_frozen_parameters": exclude_frozen_parameters, "preflight": False}
    with stock_methods(engine), ckpt.Saver(engine, save_dir, **options) as saver:
        saver.save(engine.global_steps, client_state=client_state)
    return True


@contextmanager
def stock_methods(engine: Any) -> Iterator[None]:
    """Gives an engine its own methods back, which ckpt calls, too.

    Errors leave as ``RuntimeError``, which the processes of the tests can send home.
    """
    from ckpt import CheckpointError

    for name, method in STOCK.items():
        setattr(engine, name, MethodType(method, engine))
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(str(error)) from None
    finally:
        for name in STOCK:
            delattr(engine, name)


def of_newest(load_checkpoint: Any) -> Any:
    """``engine.load_checkpoint`` without a tag, since ckpt chose it."""

    def load_newest(engine: Any, load_dir: str, tag: str | None = None, **options: Any) -> Any:
        return load_checkpoint(engine, load_dir, tag=None, **options)

    return load_newest


def load(
    engine: Any,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> tuple[str, dict[str, Any]]:
    """``engine.load_checkpoint`` by ``ckpt.resume``."""
    import ckpt

    client_state: dict[str, Any] = {}
    with stock_methods(engine):
        ckpt.resume(
            engine,
            load_dir,
            tag=tag,
            client_state=client_state,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            load_foreign=True,
            on_mismatch="warn",
        )
    return load_dir, client_state
