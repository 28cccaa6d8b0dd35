"""What retention keeps, for every run and every rule that hypothesis thinks of.

Drawing a run costs more than looking at it: each that is drawn is held against every property.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.runs.retention import Candidate, Retention, ranked

METRIC = "eval_loss"
values = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))


@st.composite
def runs(draw: st.DrawFn) -> list[Candidate]:
    steps = draw(st.lists(st.integers(0, 40), max_size=12))
    found = []
    for number, step in enumerate(steps):
        value = draw(values)
        found.append(
            Candidate(
                f"{draw(st.sampled_from(['checkpoint', 'z', 'epoch=0-step']))}-{number}",
                step,
                draw(st.sampled_from(["full", "full", "weights"])),
                {} if value is None else {METRIC: value},
                draw(st.sampled_from([(), (), (), ("pinned",), ("latest names it",), ("in use",)])),
            )
        )
    return found


rules = st.builds(
    Retention,
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 10),
    st.none() | st.tuples(st.just(METRIC), st.sampled_from(["min", "max"]), st.integers(1, 3)),
)


def the_newest_the_newest_full_and_the_marked_are_always_kept(
    held: list[Candidate], rule: Retention
) -> None:
    kept = rule.keep(held)
    for group in (held, [one for one in held if one.tier == "full"]):
        if group:
            last = max(one.step for one in group)
            assert [one for one in group if one.step == last][-1].name in kept
    assert all(one.name in kept for one in held if one.marks)


def what_is_kept_has_a_reason_and_is_there(held: list[Candidate], rule: Retention) -> None:
    kept = rule.keep(held)
    assert set(kept) <= {one.name for one in held} and all(kept.values())


def the_best_is_kept_and_nan_is_never_best(held: list[Candidate], rule: Retention) -> None:
    if rule.best is None:
        return
    kept, (_, mode, count) = rule.keep(held), rule.best
    known = [one for one in held if not math.isnan(one.metrics.get(METRIC, math.nan))]
    if known:
        pick = min if mode == "min" else max
        value = pick(one.metrics[METRIC] for one in known)
        ties = [one for one in known if one.metrics[METRIC] == value]
        newest = max(one.step for one in ties)
        assert [one for one in ties if one.step == newest][-1].name in kept
    said = [name for name, why in kept.items() if f"best {METRIC}" in why]
    assert len(said) == min(count, len(known)) and set(said) <= {one.name for one in known}


def without_rules_everything_is_kept(held: list[Candidate], _: Retention) -> None:
    assert set(Retention().keep(held)) == {one.name for one in held}


def what_is_deleted_satisfies_no_rule(held: list[Candidate], rule: Retention) -> None:
    gone = [one for one in held if one.name not in rule.keep(held)]
    if rule.last:
        above = [sum(other.step > one.step for other in held) for one in gone]
        same = [sum(other.step == one.step for other in held) for one in gone]
        assert all(a + s > rule.last for a, s in zip(above, same, strict=True))
    if rule.every:
        assert all(one.step % rule.every for one in gone)


def deleting_what_is_let_go_changes_nothing_about_the_rest(
    held: list[Candidate], rule: Retention
) -> None:
    kept = rule.keep(held)
    assert set(rule.keep([one for one in held if one.name in kept])) == set(kept)


def more_rules_never_keep_less(held: list[Candidate], rule: Retention) -> None:
    if rule == Retention():
        return
    for part in (
        Retention(rule.last),
        Retention(None, rule.every),
        Retention(None, None, rule.best),
    ):
        if part != Retention():
            assert set(part.keep(held)) <= set(rule.keep(held))


def only_steps_order_checkpoints(held: list[Candidate], rule: Retention) -> None:
    steps = {one.step for one in held}
    if len(steps) == len(held):
        mixed = random.Random(str(held)).sample(held, len(held))
        assert rule.keep(mixed) == rule.keep(held)


@settings(max_examples=200)
@given(runs(), rules)
def test_every_property_holds(held: list[Candidate], rule: Retention) -> None:
    for require in (
        the_newest_the_newest_full_and_the_marked_are_always_kept,
        what_is_kept_has_a_reason_and_is_there,
        the_best_is_kept_and_nan_is_never_best,
        without_rules_everything_is_kept,
        what_is_deleted_satisfies_no_rule,
        deleting_what_is_let_go_changes_nothing_about_the_rest,
        more_rules_never_keep_less,
        only_steps_order_checkpoints,
    ):
        require(held, rule)


def test_of_equal_values_the_newer_is_better() -> None:
    held = [Candidate("a", 1, metrics={METRIC: 2.0}), Candidate("b", 2, metrics={METRIC: 2.0})]
    for mode in ("min", "max"):
        assert [one.name for one in ranked(held, METRIC, mode)] == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("eval_loss:min:2", ("eval_loss", "min", 2)),
        ("eval_loss:max", ("eval_loss", "max", 1)),
        ("eval/f1:macro:max:3", ("eval/f1:macro", "max", 3)),
    ],
)
def test_the_command_lines_form_is_read(text: str, rule: object) -> None:
    assert Retention.best_of(text) == rule


@pytest.mark.parametrize("text", ["", "loss", "loss:least:1", ":min:1", "loss:min:0", "loss:min:x"])
def test_a_rule_for_the_best_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="eval_loss:min:2"):
        Retention.best_of(text)


@pytest.mark.parametrize(
    "wrong", [{"last": 0}, {"every": 0}, {"last": -1}, {"best": ("a", "least", 1)}]
)
def test_a_rule_that_keeps_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Retention(**wrong)  # type: ignore[arg-type]
