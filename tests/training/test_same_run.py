"""A training that goes on is the same one, or what differs is said before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_ranks
from oracles import free_port

from ckpt.engine import optimizers, parameters
from ckpt.engine.parameters import Parameter
from ckpt.engine.remedies import Ways
from ckpt.resuming.changes import Change, LoadOptions, changes
from ckpt.resuming.config import config_changes
from ckpt.state.jsonable import jsonable
from converters.errors import CheckpointError

LIMIT = 900  # seconds; a part takes 20 to 60, and minutes more where an extension is compiled


def worker(script: str, out: Path, *parts: str) -> None:
    """Runs parts of a worker in one process of its own, without a launcher."""
    ended = warm_ranks.run(
        f"tests/workers/{script}",
        [out, *parts],
        ranks=1,
        limit=LIMIT,
        environment={"MASTER_PORT": str(free_port())},
        elastic=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


# The last one compiles DeepSpeedCPUAdam, for minutes: CKPT_SLOW=1, as for a nightly run.
PARTS = ["options", "optimizers", "names", "rest", "older"]
PARTS += ["offload"] if os.environ.get("CKPT_SLOW") else []


@pytest.mark.parametrize("part", PARTS)
def test_a_plain_loop_goes_on_as_the_same_run(tmp_path: Path, part: str) -> None:
    worker("same_run_worker.py", tmp_path, part)


@pytest.mark.parametrize("part", ["hugging_face", "accelerate", "lightning"])
def test_every_front_end_compares_the_same_record(tmp_path: Path, part: str) -> None:
    worker("same_run_trainers.py", tmp_path, part)


def record(**more: Any) -> dict[str, Any]:
    """The settings of a training with LoRA."""
    names = [Parameter(f"layers.{i}.{n}.A", (4, 16)) for i in (0, 1) for n in ("q", "v")]
    group = {"lr": 6.7e-05, "initial_lr": 1e-04, "weight_decay": 0.0, "betas": [0.9, 0.999]}
    return {
        "parameters": parameters.pack(names),
        "optimizer": {"class": "AdamW", "algorithm": "AdamW", "groups": [group]},
        "scheduler": {"class": "StepLR", "options": {"step_size": 3}, "kept": ["step_size"]},
        "precision": "bf16",
        "batch": {"train_batch_size": 8, "gradient_accumulation_steps": 2, "micro_steps": 2},
        "gradient_clipping": 1.0,
        "topology": {"world_size": 2, "zero_stage": 2, "tensor_parallel": 1},
        "offload": {"optimizer": "none", "parameters": "none"},
        "adapters": {"default": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}},
        "data": {"dataset_length": 64, "sampler": "RandomSampler"},
        "config": {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}},
        **more,
    }


def differing(now: dict[str, Any], **request: Any) -> list[Change]:
    """What differs from ``record()``; JSON and back, as a manifest has it."""
    saved, here = (json.loads(json.dumps(each)) for each in (record(), record(**now)))
    return changes(saved, here, LoadOptions(**request))


def _require_states_of_options() -> None:
    """An option that would need states that the checkpoint has not is not advised, nor taken."""
    saved, now = (
        {"optimizer": {"class": kind, "algorithm": kind, "groups": [{name: value}]}}
        for kind, name, value in (("AdamW", "amsgrad", False), ("AdamW", "amsgrad", True))
    )
    (kept,) = changes(saved, now, LoadOptions())
    assert (kept.effect, "override" in kept.line) == ("kept", False)
    assert "yours needs states that it lacks" in kept.line
    (wrong,) = changes(saved, now, LoadOptions(override=frozenset({"amsgrad"})))
    assert (wrong.effect, wrong.name) == ("wrong", "amsgrad")
    (yours,) = changes(now, saved, LoadOptions(override=frozenset({"amsgrad"})))
    assert yours.effect == "yours"  # it has more states then


def test_files_that_no_load_reads_are_refused_whatever_was_asked() -> None:
    effects = []
    for now in ("none", "FSDP2, FULL_STATE_DICT", "FSDP1, SHARDED_STATE_DICT"):
        saved = {"topology": {"sharding": "FSDP2, SHARDED_STATE_DICT"}}
        (change,) = changes(saved, {"topology": {"sharding": now}}, LoadOptions())
        effects.append((change.effect, "neither reads the files" in change.line))
    assert effects == [("wrong", True), ("wrong", True), ("refused", False)]


def test_each_setting_that_differs_has_its_effect_and_its_sentence() -> None:
    assert differing({}) == []
    qk = [Parameter(f"layers.{i}.{n}.A", (4, 16)) for i in (0, 1) for n in ("q", "k")]
    (change,) = differing({"parameters": parameters.pack(qk)})
    assert change.effect == "wrong"
    for text in (
        "layers.0.v.A (4 x 16)",
        "layers.0.k.A (4 x 16)",
        "(2 that were saved are not here",
    ):
        assert text in change.line, change.line
    renamed = {f"layers.{i}.v.A": f"layers.{i}.k.A" for i in (0, 1)}
    assert differing({"parameters": parameters.pack(qk)}, renamed=renamed) == []

    group = {"lr": 0.0, "initial_lr": 5e-04, "weight_decay": 0.1, "betas": [0.9, 0.999]}
    asked = {"optimizer": {"class": "AdamW", "algorithm": "AdamW", "groups": [group]}}
    lines = [change.line for change in differing(asked)]
    assert lines == [
        "lr: 6.7e-05 of the checkpoint is used (it began with 0.0001), 0.0005 was asked for; "
        'override={"lr"} takes yours',
        'weight_decay: 0.0 of the checkpoint is used, 0.1 was asked for; override={"weight_decay"} '
        "takes yours",
    ]
    found = differing(asked, override=frozenset({"lr", "weight_decay"}))
    assert [change.effect for change in found] == ["yours", "yours"]
    assert found[0].line == "lr: 0.0005 is used, 6.7e-05 of the checkpoint is not"
    assert differing(asked, optimizer_states=False, scheduler_states=False) == []
    _require_states_of_options()

    batch = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_steps": 2}
    fewer = differing({"batch": batch, "topology": {"world_size": 1, "zero_stage": 2}})
    assert fewer[0].effect == "refused"  # of one rank instead of two
    assert fewer[0].line.startswith("train_batch_size: 8 saved, 4 now (of other ranks: set grad")

    expected = {
        "refused": [
            {"batch": {"train_batch_size": 16}},
            {"gradient_clipping": 0.5},
            {"scheduler": {"class": "CosineAnnealingLR", "options": {}, "kept": []}},
            {"scheduler": None},
            {"topology": {"tensor_parallel": 2}},
            {"adapters": {"default": {"r": 4, "lora_alpha": 32}}},
            {"adapters": {}},
            {"data": {"dataset_length": 65}},
            {"config": {"communication_data_type": "fp32"}},
            {"optimizer": {"class": "Adam", "algorithm": "Adam", "groups": []}},
        ],
        "yours": [
            {"batch": {"gradient_accumulation_steps": 4}},
            {"topology": {"world_size": 4}},
            {"offload": {"optimizer": "cpu"}},
            {"precision": "fp16"},
            {"adapters": {"default": {"target_modules": ".*[qv]"}}},
        ],
        "kept": [
            {"scheduler": {"class": "StepLR", "options": {"step_size": 4}, "kept": ["step_size"]}}
        ],
        "wrong": [{"optimizer": {"class": "SGD", "algorithm": "SGD", "groups": [{"lr": 1e-04}]}}],
    }
    for effect, settings in expected.items():
        for now in settings:
            assert {change.effect for change in differing(now)} == {effect}, now
    sgd = expected["wrong"][0]
    assert differing(sgd, optimizer_states=False) == []
    none = Ways("x", None, None)
    assert "use the saved one" in differing(sgd, ways=none)[0].line


def test_what_is_no_matter_is_no_difference() -> None:
    assert differing({"batch": {"micro_steps": 1}, "parameters": None, "data": {}}) == []
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5}
    more = {"steps_per_print": 7, "wandb": {"enabled": True}, "zero_force_ds_cpu_optimizer": False}
    now = {"gradient_clipping": 2.0, "zero_optimization": zero, **more}
    assert differing({"config": now}) == []
    saved: dict[str, Any] = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}
    now = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "loss_scale": 128}}
    assert list(config_changes(saved, now)) == ["fp16.loss_scale: none saved, 128 now"]
    assert list(config_changes({}, now)) == [
        "fp16.enabled: none saved, True now",
        "fp16.loss_scale: none saved, 128 now",
    ]
    long = {"data_types": {"list": "a" * 200 + "b"}}, {"data_types": {"list": "a" * 200 + "c"}}
    (line,) = config_changes(*long)
    assert "ab saved" in line and "ac now" in line and len(line) < 260


def test_parameters_are_compared_under_their_own_names() -> None:
    saved = [Parameter("a.weight", (4, 2)), Parameter("b.weight", (4, 2)), Parameter("c", (0,))]

    def why(names: list[str], renamed: dict[str, str] | None = None, **options: Any) -> str | None:
        now = [Parameter(name, (4, 2)) for name in names]
        return parameters.difference(saved, now, renamed or {}, **options)

    for front in ("", "module.", "_orig_mod.", "module._orig_mod."):
        assert why([f"{front}a.weight", f"{front}b.weight"]) is None
    assert why(["a._orig_mod.weight", "b._fsdp_wrapped_module.weight"]) is None
    assert why(["b.weight", "a.weight"], ordered=False) is None
    swapped = why(["b.weight", "a.weight"])
    assert swapped is not None and "renamed" not in swapped
    new = why(["a.weight", "x.weight"])
    assert new is not None and 'renamed={"b.weight": "x.weight"}' in new
    assert why(["a.weight", "x.weight"], {"b.": "x."}) is None
    assert why(["a.weight", "x.weight"], {"b.weight": "x.weight"}) is None
    assert why(["a.weight"]) is not None and why(["a.weight", "b.weight", "d"]) is not None
    moved = [Parameter("a.weight", (4, 2)), Parameter("b.weight", (4, 2), 1)]
    text = parameters.difference(saved, moved, {})
    assert text is not None and "b.weight is in param group 0 of the checkpoint" in text
    both = [Parameter("module.a", (1,)), Parameter("a", (1,))]  # not to be told apart without it
    assert parameters.difference(both, both, {}) is None
    assert parameters.difference(both, both[::-1], {}) is not None


def test_a_long_list_of_parameters_is_packed(tmp_path: Path) -> None:
    experts = [
        Parameter(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", (1536, 4096), 1)
        for layer in range(94)
        for expert in range(128)
    ]
    for some in ([], experts[:20], experts, [Parameter("scalar", ())]):
        packed = json.loads(json.dumps(parameters.pack(some)))
        assert parameters.unpack(packed) == some
    assert len(json.dumps(parameters.pack(experts))) < 200_000
    for damaged in (None, 7, {}, {"groups": [["x"]]}, {"packed": "!"}, {"packed": "eJw="}):
        assert parameters.unpack(damaged) is None


def test_algorithms_are_known_whoever_implements_them() -> None:
    held = [torch.nn.Parameter(torch.ones(2))]

    def made(name: str, **attributes: Any) -> Any:
        sort = type(name, (torch.optim.Optimizer,), attributes)
        return sort(held, {})

    pairs = {
        "AdamW": [
            torch.optim.AdamW(held),
            torch.optim.Adam(held, decoupled_weight_decay=True),
            type("Mine", (torch.optim.AdamW,), {})(held),
            made("FusedAdam", adam_w_mode=1),
            made("DeepSpeedCPUAdam", adam_w_mode=True),
        ],
        "Adam": [torch.optim.Adam(held), made("FusedAdam", adam_w_mode=0)],
        "Lion": [made("Lion"), made("FusedLion"), made("DeepSpeedCPULion")],
        "SGD": [torch.optim.SGD(held, lr=1.0)],
        "NAdam": [torch.optim.NAdam(held)],
        "torch Adafactor": [torch.optim.Adafactor(held)],
        "bitsandbytes AdamW8bit": [made("AdamW8bit", __module__="bitsandbytes.optim.adamw")],
    }
    for name, some in pairs.items():
        assert [optimizers.algorithm(each) for each in some] == [name] * len(some)
    with pytest.raises(CheckpointError, match=r"not an option of the optimizer's param groups.*lr"):
        optimizers.require_known({"rate"}, torch.optim.AdamW(held).param_groups)
    value = {"a": (1, float("nan")), "b": {2, 1}, "c": torch.tensor(3), "d": held, 5: torch.float16}
    expected = {"a": [1, "nan"], "b": [1, 2], "c": 3, "d": ["Parameter"], "5": "dtype"}
    assert jsonable(value) == expected
