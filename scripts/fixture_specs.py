"""The list of fixtures: what each one is made with. ``make_fixtures.py`` makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

Json = dict[str, Any]
WORDS = 13  # tokens in use
NVME_PATH = "/tmp/ckpt-nvme"  # it is written into the checkpoint, so the same everywhere
OFFLOAD: Json = {"offload_optimizer": {"device": "cpu"}}
NVME: Json = {
    "offload_optimizer": {"device": "nvme", "nvme_path": NVME_PATH},
    "sub_group_size": 100_000_000,
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one fixture is made; ``zero`` and ``config`` are merged into the DeepSpeed config."""

    stage: int
    dtype: str = "bf16"
    world: int = 2
    zero: Json = dataclasses.field(default_factory=dict)
    config: Json = dataclasses.field(default_factory=dict)
    groups: str = "decay"  # decay: two groups, empty: an empty one between them, one: a single
    tied: bool = True
    torch_adam: bool = True
    zero_sized: bool = False
    exclude_frozen: bool = False
    vocab: int = WORDS
    trainer: bool = False
    note: str = ""


def _grid() -> dict[str, Spec]:
    """Stages x dtypes x world sizes; groups, tying and sub-groups vary along the way."""
    specs = {}
    for stage in (1, 2, 3):
        for dtype in ("bf16", "fp16", "fp32"):
            for world in (1, 2, 3, 4):
                zero: Json = {}
                if stage == 3 and world > 1:
                    zero["stage3_param_persistence_threshold"] = 10
                if stage == 3 and world in (2, 4):
                    zero["sub_group_size"] = 40 * world
                specs[f"zero{stage}-{dtype}-w{world}"] = Spec(
                    stage,
                    dtype,
                    world,
                    zero,
                    groups="empty" if world == 3 else "one" if world == 4 else "decay",
                    tied=not (dtype == "fp32" and world in (1, 4)),
                )
    return specs


SPECS: dict[str, Spec] = {
    **_grid(),
    "zero0-bf16": Spec(0, note="FP16_UnfusedOptimizer: masters in no file but mp_rank_00"),
    "zero0-fp16": Spec(0, "fp16", groups="empty"),
    "zero0-fp32": Spec(0, "fp32", groups="empty", note="raw torch optimizer"),
    "zero0-bf16-fused": Spec(0, torch_adam=False, note="FusedAdam, so FP16_Optimizer"),
    "zero1-zero-sized": Spec(1, zero_sized=True),
    "zero2-zero-sized": Spec(2, zero_sized=True),
    "zero3-zero-sized": Spec(3, zero_sized=True),
    "zero1-exclude-frozen": Spec(1, exclude_frozen=True),
    "zero2-exclude-frozen": Spec(2, exclude_frozen=True),
    "zero3-exclude-frozen": Spec(3, exclude_frozen=True),
    "zero2-round-robin": Spec(2, world=3, zero={"round_robin_gradients": True}),
    "zero2-aligned": Spec(2, world=3, zero={"parameter_alignment": True}),
    "zero2-aligned-round-robin": Spec(
        2, world=2, zero={"parameter_alignment": True, "round_robin_gradients": True}
    ),
    "zero1-elastic": Spec(1, world=3, zero={"elastic_checkpoint": True}),
    "zero2-offload": Spec(2, world=3, zero=OFFLOAD, torch_adam=False, note="DeepSpeedCPUAdam"),
    "zero3-offload": Spec(3, zero=OFFLOAD, torch_adam=False, note="DeepSpeedCPUAdam"),
    "zero3-subgroups": Spec(3, world=3, zero={"sub_group_size": 20}, groups="empty"),
    "zero2-legacy": Spec(
        2,
        config={"checkpoint": {"checkpoint_serialization": False}},
        note="torch's stream format from before 1.6",
    ),
    "zero3-nvme": Spec(
        3,
        zero=NVME,
        torch_adam=False,
        vocab=76_000,
        note="swapped optimizer; kept as .tar.xz because DeepSpeed swaps only from 1 MiB up",
    ),
    "trainer-zero2": Spec(2, trainer=True, note="Hugging Face Trainer, tied Llama"),
    "trainer-zero3": Spec(3, trainer=True, tied=False, note="Hugging Face Trainer, untied Llama"),
}


def ds_config(spec: Spec) -> Json:
    """The DeepSpeed config of a fixture; nothing in it depends on this machine."""
    config: Json = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": spec.torch_adam}},
        "zero_optimization": {"stage": spec.stage, **spec.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **spec.config,
    }
    if spec.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif spec.dtype == "fp16":  # a small scale, so that no step is skipped for overflow
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return config


def tiny_llama(**more: Any) -> Any:
    """The configuration of the Llama that all of these trainings use."""
    import transformers as hf

    return hf.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **more,
    )
