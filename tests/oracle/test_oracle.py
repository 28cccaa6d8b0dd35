"""DeepSpeed's own zero_to_fp32.py (0.19.8) as the oracle, and where it is no oracle."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from oracles import FIXTURES, convert, corpus, live, made, root_of, same, weights_in

# Where it fails or is wrong; docs/deepspeed-differences.md tells each story. Ours is compared with
# the live engine in test_checkpoints.py.
FAILS = {
    "zero0-bf16": TypeError,
    "zero0-bf16-fused": TypeError,
    "zero0-fp16": TypeError,
    "zero0-fp32": TypeError,
    "s0bf": TypeError,
    "zero2-legacy": RuntimeError,
    "w_legacy2": RuntimeError,
    "b16opt": ValueError,
    "o0_16_9_s0bf": ValueError,
    "o0_3_16_s2": ValueError,
    "o0_5_10_s2": KeyError,
    "o0_8_3_s2": KeyError,
}
LOSES = {"o0_9_5_s2": {"head.weight"}}  # and the frozen parameters of every stage 1 checkpoint
MISSHAPES = {"zero2-zero-sized": {"empty.other", "empty.frozen"}, "s2zz": {"eb"}}
CONVERTIBLE = [*made(), *corpus(), FIXTURES / "trainer-zero2", FIXTURES / "trainer-zero3"]


def zero_to_fp32(folder: Path) -> dict:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.disable(logging.INFO)
    return get_fp32_state_dict_from_zero_checkpoint(str(folder))


@pytest.mark.parametrize("save_dir", CONVERTIBLE, ids=lambda path: path.name)
def test_ours_equals_zero_to_fp32_wherever_that_is_right(save_dir: Path, tmp_path: Path) -> None:
    if save_dir.name in FAILS:
        with pytest.raises(FAILS[save_dir.name]):
            zero_to_fp32(root_of(save_dir))
        return
    theirs = zero_to_fp32(root_of(save_dir))
    ours = convert(root_of(save_dir), tmp_path / "model", "--tied", "keep")
    names = set(ours) | {alias for alias in theirs if alias not in ours}
    lost = names - theirs.keys()
    stage1 = {name for name in live(save_dir).get("live", {}) if "frozen" in name}
    if "empty.weight" in lost:  # stage 1 loses parameters without elements as well
        stage1 |= {name for name in lost if name.startswith("empty")}
    assert lost <= (LOSES.get(save_dir.name, set()) | stage1)
    assert (lost > set()) == (
        save_dir.name in LOSES or (_stage(save_dir) == 1 and "exclude" not in save_dir.name)
    )
    wrong = [name for name in theirs if not same(theirs[name].float(), ours[name].float())]
    assert set(wrong) == MISSHAPES.get(save_dir.name, set())


def _stage(save_dir: Path) -> int:
    name = save_dir.name
    return 1 if name.startswith(("zero1", "s1")) else 2


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-fp16-w2", "trainer-zero3"])
def test_sharded_output_equals_what_zero_to_fp32_writes(name: str, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    source = root_of(FIXTURES / name)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    convert_zero_checkpoint_to_fp32_state_dict(str(source), str(theirs), max_shard_size="2KB")
    ours = convert(source, tmp_path / "ours", "--format", "bin", "--tied", "keep")
    found = weights_in(theirs)
    assert found.keys() == ours.keys()
    assert all(same(found[name].float(), ours[name].float()) for name in found)
