"""Random trainings: a model's tensors, their groups and ties, and how DeepSpeed is to train them.

``make(seed, index)`` depends on nothing else, so two numbers say all of a case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Shape = tuple[int, ...]

PLAIN = ("AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "NAdam")  # of torch
# Of deepspeed.ops, and where there; it compiles them at their first use.
BUILT = {"FusedAdam": "adam", "DeepSpeedCPUAdam": "adam"}
SHAPES: tuple[Shape, ...] = (
    *((), (1,), (2,), (7,), (13,), (64,), (1, 1), (1, 9), (5, 3), (8, 8), (11, 17), (40, 3)),
    *((2, 3, 4), (3, 1, 5), (4, 2, 3, 3), (1, 1, 1, 1), (2, 5, 1, 7)),
)
EMPTY: tuple[Shape, ...] = ((0,), (0, 3), (4, 0), (2, 0, 5))
LARGE: tuple[Shape, ...] = ((1500,), (37, 53), (3, 9, 5, 11))
MODULES = ("", "layers.0", "layers.1", "layers.2", "head", "module", "idle")
NAMES = ("weight", "bias", "scale", "gamma", "w_o", "größe", "lora_A", "fp32")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of module ``module``; ``group`` is its param group, -1: in none of them.

    ``owner`` is the index of the parameter that this one is only another name of, -1: of none.
    ``used``: the loss depends on it. ``crossed``: not contiguous, as a transposed matrix.
    ``ones``: 1.0 at the start, as the weight of a LayerNorm is.
    """

    module: str
    name: str
    shape: Shape
    trained: bool = True
    group: int = 0
    owner: int = -1
    used: bool = True
    crossed: bool = False
    ones: bool = False

    @property
    def path(self) -> str:
        """Its name in the model."""
        return f"{self.module}.{self.name}".lstrip(".")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer; ``kind`` is the name of a dtype of torch."""

    module: str
    name: str
    shape: Shape
    kind: str
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """A training and how it is saved and converted.

    ``zero`` and ``config`` are merged into the DeepSpeed config; ``groups`` are the settings of the
    param groups. ``order``: model, mixed or reversed, of a group's parameters. ``listed``: frozen
    parameters are in the groups too. ``init``: made under zero.Init (stage 3). ``twin``: the module
    layers.0 is in the model a second time, as layers.9. ``gathered_16bit``: the file of
    ``save_16bit_model`` is there. ``options`` are those of the conversion.
    """

    seed: int
    index: int
    stage: int
    dtype: str
    world: int
    optimizer: str
    steps: int
    accumulation: int
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    groups: tuple[Json, ...]
    zero: Json
    config: Json
    order: str = "model"
    listed: bool = False
    init: bool = False
    twin: bool = False
    exclude_frozen: bool = False
    gathered: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        flags = ("listed", "init", "twin", "exclude_frozen", "gathered")
        more = [flag for flag in flags if getattr(self, flag)]
        return (
            f"case {self.index} of seed {self.seed}: stage {self.stage}, {self.dtype}, "
            f"{self.world} ranks, {self.optimizer}, order {self.order}, "
            f"zero {self.zero}, config {self.config}, {' '.join(more)}"
        )

    @property
    def ds_config(self) -> Json:
        """The configuration of DeepSpeed, without an optimizer: the worker brings it."""
        config: Json = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **self.config,
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True, **self.config.get("bf16", {})}
        elif self.dtype == "fp16":  # DeepSpeed's scale overflows once; this one does not
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        return config


def make(seed: int, index: int, extensions: bool = False) -> Case:
    """A case. ``extensions``: also with optimizers that DeepSpeed has to compile."""
    chance = random.Random(f"{seed}/{index}")
    # The first cases go through stages, types and ranks in turn, so that ten of them see each.
    stage = (3, 2, 1, 0)[index % 4] if chance.random() < 0.7 else chance.choice((1, 2, 3))
    dtype = ("bf16", "fp16", "fp32")[index % 3]
    world = chance.choice((1, 2, 2, 3, 4)) if index >= 4 else index + 1
    optimizer = chance.choice((*PLAIN, *PLAIN, *(BUILT if extensions else ())))
    # The state of torch's Adagrad is made too early for the 16-bit wrappers of stage 0, and the
    # other stages make it anew with a single group.
    if (stage, optimizer) == (0, "Adagrad"):
        optimizer = "Adam"
    count = 1 if optimizer == "Adagrad" else chance.choice((1, 1, 2, 2, 3, 4))
    groups = tuple(_group(chance) for _ in range(count))
    parameters = _parameters(chance, stage, count)
    zero, config = _settings(chance, stage, dtype)
    if optimizer == "Adagrad":
        config.pop("data_types", None)  # BF16_Optimizer: as in stage 0
    return Case(
        seed,
        index,
        stage,
        dtype,
        world,
        optimizer,
        steps=chance.choice((1, 1, 2)),
        accumulation=chance.choice((1, 1, 1, 2)),
        parameters=parameters,
        buffers=_buffers(chance),
        groups=groups,
        zero=zero,
        config=config,
        order=chance.choice((*("model",) * 5, "mixed", "mixed", "reversed")),
        listed=chance.random() < 0.3,
        init=stage == 3 and chance.random() < 0.7,
        twin=chance.random() < 0.15,
        exclude_frozen=chance.random() < 0.1,
        gathered=chance.random() < 0.3,
        options=_options(chance),
    )


def _group(chance: random.Random) -> Json:
    return {
        "lr": chance.choice((0.1, 0.01, 0.003, 1e-4)),
        "weight_decay": chance.choice((0.0, 0.1, 0.01)),
    }


def _parameters(chance: random.Random, stage: int, groups: int) -> tuple[Parameter, ...]:
    """One to a dozen parameters with names of their own; at least one is trained in each case."""
    count = chance.choice((1, 2, 4, 6, 9, 12))
    frozen = chance.choice((0.0, 0.0, 0.2, 0.5, 0.9))
    tied = chance.choice((0.0, 0.0, 0.2, 0.5))
    empty = chance.choice((0.0, 0.0, 0.0, 0.15, 0.4))
    outside = chance.choice((0.0,) * 7 + (0.3,))
    alike = chance.choice((0.0, 0.0, 0.0, 0.4))
    places = [(module, name) for module in MODULES for name in NAMES]
    made: list[Parameter] = []
    for module, name in chance.sample(places, count):
        shape = chance.choice(SHAPES if chance.random() < 0.9 else LARGE)
        if made and chance.random() < tied:
            owner = chance.randrange(len(made))
            owner = made[owner].owner if made[owner].owner >= 0 else owner
            made.append(_again(made[owner], module, name, owner))
            continue
        if chance.random() < empty:
            # Idle is never called: ZeRO-3 cannot fetch what has no elements.
            module, shape = "idle" if stage == 3 else module, chance.choice(EMPTY)
        if any((other.module, other.name) == (module, name) for other in made):
            continue
        ones = chance.random() < alike
        if ones and 0 not in shape:
            shape = (7,)
        trained = not made or chance.random() >= frozen
        crossed = len(shape) > 1 and chance.random() < 0.1
        if stage == 3:  # it sends the weights as bytes, which fails for scalars and transposed ones
            shape, crossed = shape or (1,), False
        made.append(
            Parameter(
                module,
                name,
                shape,
                trained,
                -1 if made and chance.random() < outside else chance.randrange(groups),
                used=module != "idle" and chance.random() < 0.9,
                crossed=crossed,
                ones=ones and 0 not in shape,
            )
        )
    return _with_one_trained(made)


def _with_one_trained(made: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """With one more that is trained and used, since an optimizer of nothing is no training."""
    if any(p.trained and p.used and p.group >= 0 and 0 not in p.shape for p in made):
        return tuple(made)
    return (*made, Parameter("layers.0", "anchor", (3, 3)))


def _again(owner: Parameter, module: str, name: str, index: int) -> Parameter:
    return Parameter(
        "idle" if 0 in owner.shape else module,
        name if 0 not in owner.shape else f"{name}_again",
        owner.shape,
        owner.trained,
        owner.group,
        index,
        owner.used,
        owner.crossed,
        owner.ones,
    )


def _buffers(chance: random.Random) -> tuple[Buffer, ...]:
    kinds = ("float32", "float32", "int64", "bool", "float64", "bfloat16", "uint8", "int32")
    return tuple(
        Buffer(
            chance.choice(MODULES),
            f"buffer{number}",
            chance.choice((*SHAPES, *EMPTY)),
            chance.choice(kinds),
            chance.random() < 0.8,
        )
        for number in range(chance.choice((0, 1, 2, 5)))
    )


def _settings(chance: random.Random, stage: int, dtype: str) -> tuple[Json, Json]:
    zero: Json = {}
    config: Json = {}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = chance.choice((0, 10, 100_000))
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if chance.random() < 0.5:
            zero["sub_group_size"] = chance.choice((1, 20, 200, 3000))
    if stage in (1, 2):
        if chance.random() < 0.25:
            zero["round_robin_gradients"] = True
        if chance.random() < 0.15:
            zero["parameter_alignment"] = True
        if chance.random() < 0.1:
            zero["elastic_checkpoint"] = True
    if stage and chance.random() < 0.2:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage and chance.random() < 0.3:
        zero["reduce_bucket_size"] = chance.choice((10, 100, 5000))
    if stage and chance.random() < 0.3:
        zero["contiguous_gradients"] = chance.random() < 0.5
    if dtype == "bf16" and stage == 1 and "offload_optimizer" not in zero and chance.random() < 0.3:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if chance.random() < 0.08:
        config["checkpoint"] = {"checkpoint_serialization": False}
    if chance.random() < 0.3:
        config["gradient_clipping"] = 0.5
    return zero, config


def _options(chance: random.Random) -> tuple[tuple[str, Any], ...]:
    options: list[tuple[str, Any]] = [("tied", chance.choice(("keep", "drop")))]
    if chance.random() < 0.3:
        options.append(("format", "bin"))
    if chance.random() < 0.3:
        options.append(("max_shard_size", chance.choice((300, 5000))))
    return tuple(options)
