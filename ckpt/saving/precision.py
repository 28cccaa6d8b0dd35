"""A training that goes on in another precision than it was saved in: from the fp32 masters.

Masters and moments are the same in bf16, fp16 and fp32. What differs (DeepSpeed 0.19.8
``runtime/engine.py``, ``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``fp16/``):

    names of the optimizer files   bf16_zero_pp_rank_R with bf16.enabled, else zero_pp_rank_R; an
                                   engine asks for those of its own precision only
    the module's weights           the masters rounded; here they are rounded anew
    the loss scaler                pickled with the optimizer; here the engine's own stays
    without ZeRO                   fp16 and bf16 wrap the optimizer, fp32 does not
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters import states
from converters.errors import CheckpointError

SECTIONS = ("bf16", "bfloat16", "fp16", "data_types")  # of DeepSpeed's configuration
SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow")  # in an optimizer file
SCALES = (  # in the state of an optimizer without ZeRO
    *("dynamic_loss_scale", "cur_scale", "cur_iter"),
    *("last_overflow_iter", "scale_factor", "scale_window"),
)
PREFIX = "bf16_"
TRUE = ("true", "1", "1.0", "yes", "on", "y", "t")  # what DeepSpeed (pydantic) takes for it
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def of_config(config: Any) -> str | None:
    """The precision that DeepSpeed's configuration asks for; ``None`` if it is not known."""
    if not isinstance(config, Mapping):
        return None

    def enabled(name: str) -> bool:
        section = config.get(name)
        value = section.get("enabled") if isinstance(section, Mapping) else False
        return str(value).lower() in TRUE

    return (
        "bf16" if enabled("bf16") or enabled("bfloat16") else "fp16" if enabled("fp16") else "fp32"
    )


def of_state(state: Mapping[str, Any]) -> str | None:
    """The precision of a loaded file; ``None`` if it does not say.

    A configuration that was given as a path was saved as that path: then the parameters tell.
    """
    if (found := of_config(state.get("ds_config"))) is not None:
        return found
    module, buffers = state.get("module"), state.get("buffer_names") or ()
    for name, value in module.items() if isinstance(module, Mapping) else ():
        if name not in buffers and isinstance(value, torch.Tensor) and value.dtype in KINDS:
            return KINDS[value.dtype]
    return None


def of_checkpoint(folder: Path) -> str | None:
    """The precision of the checkpoint in the folder of a tag; ``None`` if it does not say."""
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    try:
        return of_config(states.read(models[0]).config or None) if models else None
    except CheckpointError:
        return None


def of_engine(engine: Any) -> str:
    """The precision that an engine computes in."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def saved_path(path: str) -> str:
    """Where an optimizer file is: under its own name or, if not there, another precision's."""
    folder, name = os.path.split(path)
    if "zero_pp_rank" not in name or os.path.exists(path):
        return path
    other = name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name
    other = os.path.join(folder, other)
    return other if os.path.exists(other) else path


def unsaid(configs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two configurations without what says the precision, where that is known to differ."""
    saved, now = configs
    if not isinstance(saved, Mapping) or not isinstance(now, Mapping):
        return configs
    if of_config(saved) == of_config(now):
        return configs
    return _without(saved), _without(now)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in SECTIONS}


@dataclass(slots=True)
class Change:
    """From the ``saved`` precision to that of the ``engine``, while one checkpoint is loaded.

    ``masters``: those of an optimizer without ZeRO, kept until the module has them.
    """

    engine: Any
    saved: str
    masters: Any = None

    @classmethod
    def of(cls, engine: Any, state: Mapping[str, Any]) -> Change | None:
        """The change that loading a file is; ``None`` if it is none."""
        saved = of_state(state)
        return cls(engine, saved) if saved not in (None, of_engine(engine)) else None

    @property
    def sentence(self) -> str:
        """What is done, as a line."""
        now = of_engine(self.engine)
        scale = "; the loss scale begins anew" if now == "fp16" else ""
        return (
            f"saved in {self.saved}, this training computes in {now}: weights and optimizer go on "
            f"from the fp32 masters{scale}"
        )

    def translate(self, state: Any, path: str) -> None:
        """Makes a loaded state one of the engine's precision, in place.

        ``CheckpointError`` if it cannot be one.
        """
        optimizer = self.engine.optimizer
        if optimizer is None:
            return
        if self.engine.zero_optimization():
            self._require_layout(path)
            for name in SCALING if isinstance(state.get("optimizer_state_dict"), dict) else ():
                if hasattr(optimizer, name):
                    state["optimizer_state_dict"][name] = getattr(optimizer, name)
        elif isinstance(state.get("optimizer"), dict) and "module" in state:
            state["optimizer"] = self._plain(state["optimizer"], state["module"], path)

    def _require_layout(self, path: str) -> None:
        """Raises where the element size decides the layout: it pads parameters to some bytes."""
        sizes = {4 if precision == "fp32" else 2 for precision in (self.saved, self._now)}
        engine = self.engine
        padded = getattr(engine, "zero_parameter_alignment", lambda: False)()
        aligned = padded and engine.zero_optimization_stage() < 3
        if aligned and len(sizes) > 1:
            raise CheckpointError(
                f"{path}: saved in {self.saved} with parameter_alignment, whose padding depends on "
                f"the precision, and this training computes in {self._now}; resume it in "
                f"{'fp32' if self.saved == 'fp32' else 'bf16 or fp16'}",
                "unsupported",
            )

    @property
    def _now(self) -> str:
        return of_engine(self.engine)

    def _plain(self, held: dict[str, Any], module: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The state of an optimizer without ZeRO, as this engine's has it."""
        optimizer = self.engine.optimizer
        wrapped, grouped = hasattr(optimizer, "fp32_groups"), "fp32_groups" in held
        flat, flattened = hasattr(optimizer, "fp32_groups_flat"), "fp32_groups_flat" in held
        if flat != flattened:
            raise CheckpointError(
                f"{path}: saved in {self.saved} without ZeRO, this training computes in "
                f"{self._now}, and one of the two keeps its masters in one piece "
                "(FusedAdam): set optimizer.params.torch_adam, or resume it in "
                f"{self.saved}, or start from its weights (ckpt to-fp32)",
                "unsupported",
            )
        if not wrapped and not flat:  # fp32: the parameters are the masters
            self.masters = held["fp32_groups"]
            return dict(held["optimizer_state_dict"])
        if not grouped and not flattened:
            held = {"optimizer_state_dict": held, "fp32_groups": self._parameters(module)}
        scale = getattr(optimizer, "loss_scale_config", None)
        scales = {name: getattr(scale, name) for name in SCALES if hasattr(scale, name)}
        return {"clip_grad": getattr(optimizer, "clip_grad", 0.0), **held, **scales}

    def _parameters(self, module: Mapping[str, Any]) -> list[list[Any]]:
        """The saved parameters, by the groups of the optimizer."""
        names = {id(parameter): name for name, parameter in self.engine.module.named_parameters()}
        groups = self.engine.optimizer.fp16_groups
        return [[module[names[id(p)]].float() for p in group] for group in groups]

    def finish(self) -> None:
        """The module gets the masters, rounded to the engine's precision; every rank calls it.

        ``CheckpointError`` where one of its values is beyond the range of fp16.
        """
        optimizer = self.engine.optimizer
        if optimizer is not None and self.engine.zero_optimization():
            if self.engine.zero_optimization_stage() < 3:  # 3 does so itself
                optimizer.update_lp_params()
        elif optimizer is not None:
            self._round(optimizer)
        if self._now == "fp16":
            _require_finite(self.engine.module)

    def _round(self, optimizer: Any) -> None:
        """The parameters of an optimizer without ZeRO, from its masters."""
        if self.masters is not None:
            groups = [group["params"] for group in optimizer.param_groups]
            masters = self.masters
        elif hasattr(optimizer, "fp32_groups_flat"):
            groups = optimizer.fp16_groups
            masters = [
                torch._utils._unflatten_dense_tensors(flat, group)  # type: ignore[no-untyped-call]
                for flat, group in zip(optimizer.fp32_groups_flat, groups, strict=True)
            ]
        else:
            groups, masters = optimizer.fp16_groups, optimizer.fp32_groups
        for group, held in zip(groups, masters, strict=True):
            for parameter, master in zip(group, held, strict=True):
                parameter.data.copy_(master.data)
        self.masters = None


@contextmanager
def from_masters(engine: Any, reader: Any) -> Iterator[None]:
    """Masters are taken from masters if the precision changes, whatever the configuration says.

    ``reader`` has a ``change`` as soon as it is known.
    """
    configured = engine.zero_load_from_fp32_weights
    engine.zero_load_from_fp32_weights = lambda: reader.change is not None or configured()
    try:
        yield
    finally:
        del engine.zero_load_from_fp32_weights


def _require_finite(module: torch.nn.Module) -> None:
    """Raises if fp16 does not hold a value of this rank's."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(_own(parameter)).all():
            raise CheckpointError(
                f"{name} has values beyond the range of fp16 (65,504), or values that are not "
                "finite; resume in bf16 or fp32",
                "unsupported",
            )


def _own(parameter: Any) -> torch.Tensor:
    """The elements that this rank holds: of a partition of stage 3, those before the padding."""
    held: torch.Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    if not hasattr(parameter, "ds_tensor"):
        return held
    rank = dist.get_rank(group=parameter.ds_process_group)
    left = parameter.ds_numel - rank * held.numel()
    return held.flatten()[: max(0, left)]
