"""What modules and optimizers of plain torch keep beside tensors comes back as it was, or is
refused by name before the first save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heavy_libraries import LateModule

from converters.errors import CheckpointError

torch: Any = LateModule("torch")
ckpt: Any = LateModule("ckpt")
dcp: Any = LateModule("torch.distributed.checkpoint")
inventory: Any = LateModule("ckpt.engine.inventory")
state_dicts: Any = LateModule("torch.distributed.checkpoint.state_dict")

EXTRA: tuple[Any, ...] = (
    {"count": 3, "scales": [1.5, {"amax": "tensor"}], "empty": {}},
    "tensor",
    None,
    {},
)
STATE = {
    "pre": ["tensor", ["tensor", 2]],
    "config": {"a.b": "tensor", "name": "x"},
    "n": 7,
    "pair": (1, 2.5),
    "nothing": None,
    "empty": [],
}


def with_tensors(value: Any, fill: float) -> Any:
    """The same with a tensor for each text "tensor"."""
    if isinstance(value, dict):
        return {key: with_tensors(entry, fill) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_tensors(entry, fill) for entry in value]
    return torch.full((2, 3), fill, dtype=torch.float64) if value == "tensor" else value


def model_of(extra: list[Any]) -> Any:
    """Linear layers, each with an extra state of its own."""

    class WithExtra(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def __init__(self, value: Any) -> None:
            super().__init__(3, 3)
            self.value = value

        def get_extra_state(self) -> Any:
            return self.value

        def set_extra_state(self, state: Any) -> None:
            self.value = state

    return torch.nn.Sequential(*map(WithExtra, extra))


def optimizer_of(model: Any, state: dict[str, Any] | None, **options: Any) -> Any:
    """One whose states are of any form."""

    class Nested(torch.optim.Optimizer):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for value in group["params"]:
                    self.state[value] = state

    optimizer = Nested(model.parameters(), {"lr": 0.1, **options})
    if state is not None:
        optimizer.step()
    return optimizer


def require_equal(value: Any, expected: Any, where: str = "state") -> None:
    assert type(value) is type(expected), (where, value, expected)
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected:
            require_equal(value[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(value) == len(expected), where
        for index, pair in enumerate(zip(value, expected, strict=True)):
            require_equal(*pair, f"{where}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert value.dtype == expected.dtype and torch.equal(value, expected), where
    else:
        assert value == expected, where


def save(run: Path, model: Any, optimizer: Any) -> None:
    with ckpt.Saver(model=model, optimizer=optimizer, run=run) as saver:
        saver.save(2)


def test_nested_states_and_extra_state_come_back(tmp_path: Path) -> None:
    model = model_of(with_tensors([*EXTRA], 1.25))
    state = with_tensors(STATE, 0.1)
    options = {"plan": {"warm": [1, 2]}, "element_type": torch.bfloat16, "factor": torch.ones(3)}
    optimizer = optimizer_of(model, state, **options)
    save(tmp_path, model, optimizer)

    fresh = model_of(with_tensors([{"count": 0}, "tensor", 1, {}], 0.0))
    fresh_optimizer = optimizer_of(fresh, None, **options | {"plan": {"warm": [1, 2]}})
    assert ckpt.resume(model=fresh, optimizer=fresh_optimizer, run=tmp_path) == 2
    require_equal({**fresh.state_dict()}, {**model.state_dict()})
    require_equal(fresh_optimizer.state_dict(), optimizer.state_dict())


def test_stock_torch_loads_them(tmp_path: Path) -> None:
    model, state = model_of([{"count": 3}]), with_tensors({"pre": ["tensor"], "n": 7}, 0.1)
    save(tmp_path, model, optimizer_of(model, state))

    fresh = model_of([{"count": 0}])
    fresh_optimizer = optimizer_of(fresh, with_tensors({"pre": ["tensor"], "n": 0}, 0.0))
    of_model, of_optimizer = state_dicts.get_state_dict(fresh, fresh_optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(states, checkpoint_id=tmp_path / "checkpoint-2", no_dist=True)
    assert states["model"]["0._extra_state"] == {"count": 3}
    require_equal(states["optimizer"]["state"]["0.weight"], state)


def test_lbfgs_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    def train(model: Any, optimizer: Any) -> None:
        def loss() -> Any:
            optimizer.zero_grad()
            value = model(torch.ones(2, 3)).square().mean()
            value.backward()
            return value

        optimizer.step(loss)

    torch.manual_seed(1)
    model, fresh = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    optimizer, fresh_optimizer = (
        torch.optim.LBFGS(each.parameters(), max_iter=3) for each in (model, fresh)
    )
    train(model, optimizer)
    save(tmp_path, model, optimizer)
    ckpt.resume(model=fresh, optimizer=fresh_optimizer, run=tmp_path)
    for each in ((model, optimizer), (fresh, fresh_optimizer)):
        train(*each)
    require_equal({**fresh.state_dict()}, {**model.state_dict()})
    require_equal(fresh_optimizer.state_dict(), optimizer.state_dict())


REFUSALS: dict[str, tuple[Any, dict[Any, Any], str]] = {
    "object": (object(), {}, "model.0._extra_state is an object"),
    "number": ({3: 1}, {}, "model.0._extra_state has an entry under 3"),
    "tuple": (None, {"pre": (1, {2.5: object()})}, "optimizer.state.0.weight.pre has a dict in"),
    "two": (None, {"a": {"b": 1}, "a.b": 2}, "calls optimizer.state.0.weight.a.b"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_not_come_back_is_refused_at_once(case: str, tmp_path: Path) -> None:
    extra, state, words = REFUSALS[case]
    model = model_of([extra])
    with pytest.raises(CheckpointError, match=words):
        ckpt.Saver(model=model, optimizer=optimizer_of(model, state), run=tmp_path)


def test_a_state_of_no_parameter_is_refused(tmp_path: Path) -> None:
    model = model_of([None])
    optimizer = optimizer_of(model, {"n": 1})
    optimizer.state["all"] = {"k": 1}
    with pytest.raises(CheckpointError, match="keeps a state that is of none of the parameters"):
        ckpt.Saver(model=model, optimizer=optimizer, run=tmp_path)


def test_a_model_with_other_extra_state_is_another_model(tmp_path: Path) -> None:
    model = model_of([{"count": 3}])
    save(tmp_path, model, optimizer_of(model, {"n": 1}))
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"it has 0\._extra_state"):
        ckpt.resume(model=plain, optimizer=optimizer_of(plain, None), run=tmp_path)


Split = Callable[[list[Any]], list[list[Any]]]
GROUPS: dict[str, tuple[Split, Split, str]] = {
    "split": (lambda v: [v], lambda v: [v[:1], v[1:]], "0.bias is in param group 1 .* group 0;"),
    "joined": (lambda v: [v[:1], v[1:]], lambda v: [v], "0.bias is in param group 0 .* group 1;"),
    "new": (lambda v: [v[:1]], lambda v: [v], "0.bias is in param group 0 .* none at the save"),
    "lost": (lambda v: [v], lambda v: [v[:1]], "0.bias was saved in param group 0, and is in none"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_other_groups_are_an_error_that_says_what_differs(case: str, tmp_path: Path) -> None:
    split_then, split_now, words = GROUPS[case]
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    then, now = (
        torch.optim.SGD([{"params": part} for part in split([*model.parameters()])], lr=0.1)
        for split in (split_then, split_now)
    )
    save(tmp_path, model, then)
    with pytest.raises(CheckpointError, match=words):
        ckpt.resume(model=model, optimizer=now, run=tmp_path, on_mismatch="warn")


def test_a_sharded_model_is_called_by_its_own_class() -> None:
    class Config:
        architectures: list[str] | None = None

        def save_pretrained(self, folder: Path) -> None: ...
        def to_dict(self) -> dict[str, Any]:
            return {}

    from torch.distributed.fsdp import FSDPModule

    class Tiny(torch.nn.Linear):  # type: ignore[misc, name-defined]
        config = Config()

    model = Tiny(2, 2)
    model.__class__ = type("FSDPTiny", (FSDPModule, Tiny), {})  # as fully_shard does
    for names, expected in ((None, "Tiny"), (["FSDPTiny"], "Tiny"), (["Another"], "Another")):
        Tiny.config.architectures = names
        assert inventory.config_of(model).architectures == [expected]
