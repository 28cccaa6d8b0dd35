"""One rank of a live training whose weights are saved while it runs.

Started by ``test_live.py`` through torchrun: ``live_worker.py OUT_DIR PART``, one function each.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/fixtures"))

from fixture_specs import OFFLOAD, Json, Spec, ds_config, tiny_llama
from fixture_worker import Tiny, live_state, param_groups

from ckpt import live
from ckpt.live import export
from converters.errors import CheckpointError

SMALL = {"stage3_param_persistence_threshold": 10}  # so that only the smallest stay whole
CASES = {
    "zero0-fp32": Spec(0, "fp32"),
    "zero0-bf16": Spec(0),
    "zero1-bf16": Spec(1),
    "zero1-fp32-grads": Spec(1, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero1-round-robin": Spec(1, "fp16", zero={"round_robin_gradients": True}),
    "zero2-fp16": Spec(2, "fp16", groups="one", zero_sized=True),
    "zero2-fp32": Spec(2, "fp32"),
    "zero2-aligned": Spec(2, zero={"parameter_alignment": True, "round_robin_gradients": True}),
    "zero2-offload": Spec(2, zero=OFFLOAD),
    "zero3-bf16": Spec(3, zero=SMALL, zero_sized=True),
    "zero3-fp32": Spec(3, "fp32", zero=SMALL, tied=False),
    "zero3-subgroups": Spec(3, "fp16", zero={"sub_group_size": 20, **SMALL}),
    "zero3-offload": Spec(3, zero={**OFFLOAD, **SMALL}),
}
VOCAB = 76_000  # DeepSpeed swaps only from 1 MiB up


def swapped(folder: Path) -> dict[str, Spec]:
    """Cases with NVMe offload, which need an extension that takes minutes to compile."""
    nvme: Json = {"device": "nvme", "nvme_path": str(folder)}
    optimizer = {"offload_optimizer": nvme, "sub_group_size": 100_000_000}
    return {
        "zero3-nvme": Spec(3, zero=optimizer, vocab=VOCAB),
        "zero3-nvme-params": Spec(
            3,
            zero={**optimizer, "offload_param": {**nvme, "buffer_size": 700_000}},
            vocab=160_000,
            tied=False,
        ),
    }


def start(spec: Spec, model: nn.Module | None = None) -> Any:
    """An engine, always the same."""
    import deepspeed

    config = ds_config(spec)
    torch.manual_seed(1234)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=spec.stage == 3):
        model = model or Tiny(spec)
    groups = param_groups(model, spec.groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    torch.manual_seed(100 + dist.get_rank())
    return engine


def train(engine: Any, steps: int = 2) -> list[float]:
    """The losses of some steps."""
    losses = []
    for _ in range(steps):
        loss = engine(torch.randint(13, (2, 6)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def finals(engine: Any) -> dict[str, torch.Tensor]:
    """All fp32 values, on rank 0."""
    return live.fp32_state_dict(engine) or {}


def require_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), (what, name)


def cases(out: Path) -> None:
    """Every case: save in the middle of a training, which must go on as one that did not save."""
    each(out, CASES)


def nvme(out: Path) -> None:
    """The same with NVMe offload."""
    each(out, swapped(out / "swap"))


def each(out: Path, specs: dict[str, Spec]) -> None:
    from safetensors.torch import save_file

    for name, spec in specs.items():
        folder, began = out / name, time.monotonic()
        engine = start(spec)
        losses = train(engine)
        engine.save_checkpoint(str(folder / "checkpoint"))
        live.save_fp32(engine, folder / "fp32")
        live.save_fp32(engine, folder / "shards", max_shard_size=300)
        live.save_16bit(engine, folder / "16bit")
        state = live.fp32_state_dict(engine)
        assert (state is None) == (dist.get_rank() > 0)
        alone = live.fp32_state_dict(engine, 1)
        assert (alone is None) == (dist.get_rank() != 1)
        everywhere = live.fp32_state_dict(engine, None)
        assert everywhere is not None
        for other in (state, alone):
            assert other is None or all(torch.equal(everywhere[k], v) for k, v in other.items())
        losses += train(engine)
        ends = finals(engine)
        if state is not None:
            save_file({k: v.clone() for k, v in state.items()}, folder / "state.safetensors")
        engine.destroy()

        engine = start(spec)
        undisturbed = train(engine)
        if name != "zero1-fp32-grads":  # live_state does not know its attributes
            truth = live_state(engine, spec)
            if not dist.get_rank():
                save_file(truth, folder / "live.safetensors")
        undisturbed += train(engine)
        assert losses == undisturbed, (name, losses, undisturbed)
        require_same(finals(engine), ends, name)
        engine.destroy()
        if not dist.get_rank():
            print(f"{name} {time.monotonic() - began:.1f} s", flush=True)


def caught(call: Any, *args: Any, **kwargs: Any) -> tuple[str, float]:
    """The error of a call and the seconds until it came."""
    began = time.monotonic()
    try:
        call(*args, **kwargs)
    except CheckpointError as error:
        return str(error), time.monotonic() - began
    raise AssertionError("no error")


def caught_while_absent(over: Path, late: bool, call: Callable[[], Any]) -> tuple[str, float]:
    """As ``caught``; a rank that is ``late`` calls when the other has given up, which is noted."""
    end = time.monotonic() + 60
    while late and not over.exists():
        assert time.monotonic() < end, "the other rank did not give up"
        time.sleep(0.02)
    error = caught(call)
    over.touch()
    return error


def failures(out: Path) -> None:
    """What goes wrong on one rank is told on both, and the next save works."""
    rank = dist.get_rank()
    engine = start(CASES["zero2-offload"])
    train(engine)
    told: dict[str, tuple[str, float]] = {}
    real, count = export.masters, iter(range(100))

    def save(**kwargs: Any) -> Path:
        folder = out / f"good{next(count)}"
        live.save_fp32(engine, folder, timeout=20, **kwargs)
        return folder

    def broken(*args: Any) -> Any:
        pieces = real(*args)
        yield next(pieces)
        raise RuntimeError("memory on fire")

    def own(name: str) -> Path:  # a folder that the other rank does not see
        return out / f"of-rank-{rank}" / name

    reference = (save() / "model.safetensors").read_bytes()

    def works() -> None:
        assert (save() / "model.safetensors").read_bytes() == reference

    for name, place, by in (
        ("raises", out, 1),
        ("raises-0", out, 0),
        ("raises-unshared", own(""), 1),
        ("raises-unshared-0", own(""), 0),
    ):
        export.masters = broken if rank == by else real
        told[name] = caught(live.save_fp32, engine, place / name, timeout=20)
        export.masters = broken if rank == by else real
        told[f"{name}-state"] = caught(live.fp32_state_dict, engine, timeout=20)
        export.masters = real
        works()
    live.save_fp32(engine, own("unshared"), timeout=20)
    live.save_16bit(engine, own("unshared-16"), timeout=20)
    told["exists"] = caught(live.save_fp32, engine, out / "good0", timeout=20)
    live.save_fp32(engine, out / "good0", overwrite=True, timeout=20)
    told["size"] = caught(live.save_fp32, engine, out / "size", f"{300 + 700 * rank}B", timeout=20)
    told["no size"] = caught(live.save_fp32, engine, out / "size", "many", timeout=20)
    for name, late in (("absent", 1), ("absent-0", 0)):
        told[name] = caught_while_absent(
            out / f"told-{name}",
            rank == late,
            lambda: live.save_fp32(engine, out / name, timeout=2),  # noqa: B023
        )
        dist.barrier()
        works()

    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    if rank == 1:
        flat.data[3] += 1
    told["unlike"] = caught(live.save_fp32, engine, out / "unlike", timeout=20)
    save(verify=False)
    parameter = engine.module.blocks[1].up.weight
    parameter.data = torch.empty(0, dtype=parameter.dtype)
    told["placeholder"] = caught(live.save_16bit, engine, out / "placeholder", timeout=20)
    export.masters = real
    if rank == 1:
        export.masters = lambda *args: os._exit(0)
        (out / "told1.json").write_text(json.dumps(told))
    told["dies"] = caught(live.save_fp32, engine, out / "dies", timeout=3)
    (out / "told0.json").write_text(json.dumps(told))
    os._exit(0)  # what closes a training in order waits for the dead rank


class Deep(nn.Module):
    """About 100 MB in fp32, cheap to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(24))
        self.tables = nn.Embedding(13, 1024)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tables(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x.float().pow(2).mean()


def resident(key: str) -> int:
    """A size of this process in bytes: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def memory(out: Path) -> None:
    """The peak of each function over what the training takes between two steps."""
    import deepspeed

    peaks = {}
    for stage in (2, 3):
        spec = Spec(stage)
        config = ds_config(spec)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = Deep()
        engine = start(spec, model)
        train(engine, 1)
        for name, call, folder in (
            ("save_fp32", live.save_fp32, out / f"fp32-{stage}"),
            ("save_16bit", live.save_16bit, out / f"16-{stage}"),
            ("unshared", live.save_fp32, out / f"of-rank-{dist.get_rank()}" / str(stage)),
        ):
            gc.collect()
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, began = resident("VmRSS"), time.monotonic()
            call(engine, folder)
            peaks[f"{name}-{stage}"] = (resident("VmHWM") - before, time.monotonic() - began)
        engine.destroy()
        del engine, model
        gc.collect()
    (out / f"peaks{dist.get_rank()}.json").write_text(json.dumps(peaks))


def llama(out: Path) -> None:
    """A Hugging Face model: configuration and tied names."""
    import transformers as hf

    config = tiny_llama(tie_word_embeddings=True)
    torch.manual_seed(7)
    engine = start(Spec(2), hf.AutoModelForCausalLM.from_config(config))
    ids = torch.randint(64, (2, 8))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    live.save_fp32(engine, out / "llama", max_shard_size="5KB")
    live.save_16bit(engine, out / "llama-16")
    live.save_fp32(engine, out / "layer", strip="model.", select="layers.1.*")
    renamed = live.fp32_state_dict(engine, None, rename=[(r"^model\.", "decoder.")])
    assert (
        renamed is not None and renamed["lm_head.weight"] is renamed["decoder.embed_tokens.weight"]
    )
    head = live.fp32_state_dict(engine, None, select=["lm_head.weight"])
    assert head is not None and torch.equal(head["lm_head.weight"], renamed["lm_head.weight"])


def main() -> None:
    import deepspeed

    # DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes it all the same.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    globals()[sys.argv[2]](Path(sys.argv[1]))


if __name__ == "__main__":
    main()
