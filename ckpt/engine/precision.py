"""A training that goes on in another precision than it was saved in:
from the fp32 masters.

Masters and moments are the same in bf16, fp16 and fp32. What differs (DeepSpeed 0.19.8
``runtime/engine.py``, ``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``fp16/``):

    names of the optimizer files   bf16_zero_pp_rank_R with bf16.enabled, else zero_pp_rank_R; an
                                   engine asks for those of its own precision only
    the module's weights           the masters rounded; here they are rounded again
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

from ckpt.engine.view import EngineView, internals
from converters.errors import CheckpointError
from converters.zero.files import state_files

SECTIONS = ("bf16", "bfloat16", "fp16", "data_types")  # of DeepSpeed's configuration
SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow")  # in an optimizer file
SCALES = (  # in the state of an optimizer without ZeRO
    *("dynamic_loss_scale", "cur_scale", "cur_iter"),
    *("last_overflow_iter", "scale_factor", "scale_window"),
)
PREFIX = "bf16_"
# What DeepSpeed (pydantic) takes for true.
TRUE = ("true", "1", "1.0", "yes", "on", "y", "t")
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def of_config(config: Any) -> str | None:
    """The precision that DeepSpeed's configuration asks for;
    ``None`` if it is not known."""
    if not isinstance(config, Mapping):
        return None

    def enabled(name: str) -> bool:
        section = config.get(name)
        value = section.get("enabled") if isinstance(section, Mapping) else False
        return str(value).lower() in TRUE

    if enabled("bf16") or enabled("bfloat16"):
        return "bf16"
    return "fp16" if enabled("fp16") else "fp32"


def of_state(state: Mapping[str, Any]) -> str | None:
    """The precision of a loaded file; ``None`` if it does not say.

    A configuration that was given as a path was saved as that path: then the parameters
    tell.
    """
    if (precision := of_config(state.get("ds_config"))) is not None:
        return precision
    module, buffers = state.get("module"), state.get("buffer_names") or ()
    for name, value in module.items() if isinstance(module, Mapping) else ():
        if name in buffers or not isinstance(value, torch.Tensor):
            continue
        if value.dtype in KINDS:
            return KINDS[value.dtype]

    return None


def of_checkpoint(folder: Path) -> str | None:
    """The precision of the checkpoint in the folder of a tag;
    ``None`` if it does not say."""
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    try:
        return of_config(state_files.read(models[0]).config or None) if models else None
    except CheckpointError:
        return None


def of_engine(engine: EngineView) -> str:
    """The precision that an engine computes in."""
    if internals(engine).bfloat16_enabled():
        return "bf16"
    return "fp16" if internals(engine).fp16_enabled() else "fp32"


def saved_path(path: str) -> str:
    """Where an optimizer file is: under its own name or,
    if not there, another precision's."""
    folder, name = os.path.split(path)
    if "zero_pp_rank" not in name or os.path.exists(path):
        return path
    alternative = name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name
    alternative = os.path.join(folder, alternative)
    return alternative if os.path.exists(alternative) else path


def unsaid(configs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two configurations without what says the precision, where that is known to differ."""
    saved, current = configs
    if not isinstance(saved, Mapping) or not isinstance(current, Mapping):
        return configs
    if of_config(saved) == of_config(current):
        return configs
    return _without_precision(saved), _without_precision(current)


def _without_precision(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in SECTIONS}


@dataclass(slots=True)
class PrecisionChange:
    """From the ``saved`` precision to that of the ``engine``,
    while one checkpoint is loaded.

    ``masters``: those of an optimizer without ZeRO, kept until the module has them.
    """

    engine: EngineView
    saved: str
    masters: Any = None

    @classmethod
    def of(cls, engine: EngineView, state: Mapping[str, Any]) -> PrecisionChange | None:
        """The change of precision that loading a file makes; ``None`` if it makes none."""
        saved = of_state(state)
        return cls(engine, saved) if saved not in (None, of_engine(engine)) else None

    @property
    def sentence(self) -> str:
        """A line on what the change does."""
        current = of_engine(self.engine)
        scale = "; the loss scale begins at its initial value" if current == "fp16" else ""
        return (
            f"saved in {self.saved}, this training computes in {current}: weights and "
            f"optimizer go on from the fp32 masters{scale}"
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
            saved_state = state.get("optimizer_state_dict")
            for name in SCALING if isinstance(saved_state, dict) else ():
                if hasattr(optimizer, name):
                    saved_state[name] = getattr(optimizer, name)
        elif isinstance(state.get("optimizer"), dict) and "module" in state:
            saved_state, module = state["optimizer"], state["module"]
            state["optimizer"] = self._translate_plain(saved_state, module, path)

    def _require_layout(self, path: str) -> None:
        """Raises where the element size decides the layout:
        it pads parameters to some bytes."""
        precisions = (self.saved, self._engine_precision)
        sizes = {4 if precision == "fp32" else 2 for precision in precisions}
        engine = self.engine
        pads_parameters = getattr(engine, "zero_parameter_alignment", lambda: False)()
        is_aligned = pads_parameters and engine.zero_optimization_stage() < 3
        if is_aligned and len(sizes) > 1:
            raise CheckpointError(
                f"{path}: saved in {self.saved} with parameter_alignment, whose "
                "padding depends on the precision, and this training computes in "
                f"{self._engine_precision}; resume it in "
                f"{'fp32' if self.saved == 'fp32' else 'bf16 or fp16'}",
                "unsupported",
            )

    @property
    def _engine_precision(self) -> str:
        return of_engine(self.engine)

    def _translate_plain(
        self, saved_state: dict[str, Any], module: Mapping[str, Any], path: str
    ) -> dict[str, Any]:
        """The state of an optimizer without ZeRO, as this engine's has it."""
        optimizer = self.engine.optimizer
        is_wrapped = hasattr(optimizer, "fp32_groups")
        had_groups = "fp32_groups" in saved_state
        is_flat = hasattr(optimizer, "fp32_groups_flat")
        was_flat = "fp32_groups_flat" in saved_state
        if is_flat != was_flat:
            raise CheckpointError(
                f"{path}: saved in {self.saved} without ZeRO, this training computes "
                f"in {self._engine_precision}, and one of the two keeps its masters "
                "in one piece (FusedAdam): set optimizer.params.torch_adam, or "
                f"resume it in {self.saved}, or start from its weights (ckpt to-fp32)",
                "unsupported",
            )

        if not is_wrapped and not is_flat:  # fp32: the parameters are the masters
            self.masters = saved_state["fp32_groups"]
            return dict(saved_state["optimizer_state_dict"])

        if not had_groups and not was_flat:
            saved_state = {
                "optimizer_state_dict": saved_state,
                "fp32_groups": self._parameters(module),
            }
        # before DeepSpeed 0.18 the optimizer itself has them
        scale = getattr(optimizer, "loss_scale_config", optimizer)
        scales = {name: getattr(scale, name) for name in SCALES if hasattr(scale, name)}
        return {
            "clip_grad": getattr(optimizer, "clip_grad", 0.0),
            **saved_state,
            **scales,
        }

    def _parameters(self, module: Mapping[str, Any]) -> list[list[Any]]:
        """The saved parameters, by the groups of the optimizer."""
        names = {id(parameter): name for name, parameter in self.engine.module.named_parameters()}
        return [
            [module[names[id(parameter)]].float() for parameter in group]
            for group in self.engine.optimizer.fp16_groups
        ]

    def finish(self) -> None:
        """Gives the module the masters,
        rounded to the engine's precision; every rank calls it.

        ``CheckpointError`` where one of its values is beyond the range of fp16.
        """
        optimizer = self.engine.optimizer
        if optimizer is not None and self.engine.zero_optimization():
            if self.engine.zero_optimization_stage() < 3:  # 3 does so itself
                optimizer.update_lp_params()
        elif optimizer is not None:
            self._round(optimizer)
        if self._engine_precision == "fp16":
            _require_finite(self.engine.module)

    def _round(self, optimizer: Any) -> None:
        """Rounds the parameters of an optimizer without ZeRO from its masters."""
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

        for group, group_masters in zip(groups, masters, strict=True):
            for parameter, master in zip(group, group_masters, strict=True):
                parameter.data.copy_(master.data)

        self.masters = None


@contextmanager
def from_masters(engine: EngineView, reader: Any) -> Iterator[None]:
    """Has masters taken from masters if the precision changes, in this block.

    ``reader`` has a ``change`` as soon as it is known.
    """
    configured = internals(engine).zero_load_from_fp32_weights

    def from_fp32() -> Any:
        return reader.change is not None or configured()

    internals(engine).zero_load_from_fp32_weights = from_fp32
    try:
        yield
    finally:
        del internals(engine).zero_load_from_fp32_weights


def _require_finite(module: torch.nn.Module) -> None:
    """Raises if fp16 does not hold a value of this rank's."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(_own_elements(parameter)).all():
            raise CheckpointError(
                f"{name} has values beyond the range of fp16 (65,504), or values that "
                "are not finite; resume in bf16 or fp32",
                "unsupported",
            )


def _own_elements(parameter: Any) -> torch.Tensor:
    """The elements that this rank holds:
    of a partition of stage 3, those before the padding."""
    shard: torch.Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    if not hasattr(parameter, "ds_tensor"):
        return shard
    rank = dist.get_rank(group=parameter.ds_process_group)
    remaining = parameter.ds_numel - rank * shard.numel()
    return shard.flatten()[: max(0, remaining)]
