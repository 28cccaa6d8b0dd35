"""The same through the front ends, on one rank: ``same_run_trainers.py OUT_DIR PART [PART ...]``.

Started by ``test_same_run.py`` without a launcher; each part asserts for itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ending import leave
from same_run_worker import hearing

from converters.errors import CheckpointError

QV, QK = ["q_proj", "v_proj"], ["q_proj", "k_proj"]


def refusal(call: Callable[[], Any], *texts: str) -> str:
    """The error of ``call``, which says all ``texts``."""
    try:
        call()
    except CheckpointError as error:
        for text in texts:
            assert text in str(error), (text, str(error))
        return str(error)
    raise AssertionError(f"it went on: {texts}")


def hugging_face(out: Path) -> None:
    import hf_worker
    import transformers as hf
    from accelerate.state import AcceleratorState
    from fixture_specs import tiny_llama
    from peft import LoraConfig, get_peft_model

    from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints, ResumeCallback

    class Rates(hf.TrainerCallback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

        def on_step_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

    def make(run: Path, steps: int = 2, lora: Any = None, **more: Any) -> Any:
        """A Trainer with the attributes and arguments in ``more``; ``callbacks``: not the class."""
        AcceleratorState._reset_state(True)
        callbacks, rows = more.pop("callbacks", None), more.pop("rows", 32)
        names = ("on_mismatch", "override", "renamed", "load_optimizer_states", "committed_only")
        attributes = {name: more.pop(name) for name in names if name in more}
        bases = (hf.Trainer,) if callbacks is not None else (CommittedCheckpoints, hf.Trainer)
        kind = type("Mine", bases, attributes)
        options = {"max_steps": steps, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
        options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "bf16": True}
        options |= {"report_to": "none", "disable_tqdm": True, "seed": 12, "weight_decay": 0.0}
        options |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, **more}
        config = hf_worker.config(2) | {"gradient_clipping": "auto"}
        args = hf.TrainingArguments(output_dir=str(run), deepspeed=config, **options)
        torch.manual_seed(12)
        llama = tiny_llama(tie_word_embeddings=True)
        llama.num_hidden_layers = 1
        model: Any = hf.AutoModelForCausalLM.from_config(llama)
        if lora is not None:
            model = get_peft_model(model, LoraConfig(**{"r": 3, **lora}))
        rates = Rates()
        data = [{"input_ids": [i % 60 + 4] * 8, "labels": [i % 60 + 4] * 8} for i in range(rows)]
        trainer = kind(model, args, train_dataset=data, callbacks=[rates, *(callbacks or [])])
        trainer.rates = rates.rates
        return trainer

    def resumed(run: Path, **more: Any) -> Any:
        trainer = make(run, 3, **more)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        return trainer

    def fails(run: Path, *texts: str, **more: Any) -> None:
        trainer = make(run, 3, **more)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        path = str(run / "checkpoint-2")
        refusal(lambda: trainer.train(resume_from_checkpoint=path), *texts)
        if "callbacks" not in more:  # which look when all is loaded
            for name, value in trainer.model.named_parameters():
                assert torch.equal(value, start[name].to(value.dtype)), name

    lora = out / "lora"
    make(lora, lora={"target_modules": QV}).train()
    both = ("v_proj.lora_A.default.weight (3 x 16)", "k_proj.lora_A.default.weight (3 x 16)")
    fails(lora, *both, lora={"target_modules": QK})
    fails(lora, *both, lora={"target_modules": QK}, on_mismatch="warn")
    late = {"callbacks": [ResumeCallback(on_mismatch="warn")]}
    fails(lora, *both, lora={"target_modules": QK}, **late)
    fails(lora, "lora_alpha: 8 saved, 32 now", lora={"target_modules": QV, "lora_alpha": 32})
    regex = {"target_modules": r".*(q_proj|v_proj)$"}
    resumed(lora, lora=regex)  # the same modules by another name for them

    run = out / "full"
    make(run).train()
    text = ("train_batch_size: 2 saved, 4 now", 'on_mismatch = "warn" in the Trainer')
    fails(run, *text, per_device_train_batch_size=4)
    fails(run, "train_batch_size: 2 saved, 4 now", gradient_accumulation_steps=2)
    fails(run, "gradient_clipping: 1.0 saved, 0.5 now", max_grad_norm=0.5)
    fails(run, "dataset_length: 32 saved, 30 now", rows=30)
    for name, sort in (("sgd", "SGD"), ("rmsprop", "RMSprop"), ("adagrad", "Adagrad")):
        fails(run, f"AdamW saved, {sort} now", "load_optimizer_states = False", optim=name)
    resumed(run, optim="sgd", load_optimizer_states=False)
    resumed(run, max_grad_norm=0.5, on_mismatch="warn")
    resumed(run, max_grad_norm=0.5, callbacks=[ResumeCallback(on_mismatch="warn")])
    # Of a Trainer with the callbacks alone, the same when all is loaded.
    both = lambda **more: {"callbacks": [CheckpointCallback(), ResumeCallback(**more)]}  # noqa: E731
    fails(run, "train_batch_size: 2 saved, 4 now", per_device_train_batch_size=4, **both())
    fails(run, "gradient_clipping: 1.0 saved, 0.5 now", max_grad_norm=0.5, **both())
    text = (
        "checkpoint-2/global_step2/",
        "no momentum, which SGD needs",
        "CommittedCheckpoints among",
    )
    fails(run, *text, optim="sgd", **both())
    bare = out / "bare"  # complete, not committed
    shutil.copytree(run / "checkpoint-2", bare / "checkpoint-2")
    (bare / "checkpoint-2/manifest.json").unlink()
    text = ("checkpoint-2 has no manifest.json, and committed_only=True takes only committed",)
    fails(bare, *text, committed_only=True)
    fails(bare, *text, callbacks=[ResumeCallback(committed_only=True)])
    same = {"save_steps": 3, "logging_steps": 7, "per_device_train_batch_size": 1}
    same |= {"gradient_accumulation_steps": 2}
    for more in ({}, both()):
        assert resumed(run, **same, **more).rates[0] == 1e-2
        asked = {"learning_rate": 4e-2, "weight_decay": 0.1}
        with hearing() as lines:
            assert set(resumed(run, **asked, **more).rates) == {1e-2}
        said = "\n".join(lines)
        assert "lr: 0.01 of the checkpoint is used, 0.04 was asked for" in said, said
        assert "weight_decay of param group 0: 0.0 of the checkpoint" in said, said
        own = {"override": {"lr", "weight_decay"}}
        more = both(**own) if more else own
        trainer = resumed(run, **asked, **more)
        assert set(trainer.rates) == {4e-2}, trainer.rates
        held = [g["weight_decay"] for g in trainer.optimizer.param_groups]
        assert held == [0.1, 0.0], held


def accelerate(out: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin
    from same_run_worker import Net, config, half_life

    from ckpt.trainers.accelerate import load_state, save_state

    PartialState._reset_state()
    PartialState(cpu=True, backend="gloo")

    def begin(sort: Any = torch.optim.AdamW, rows: int = 16, **options: Any) -> Any:
        AcceleratorState._reset_state()
        clip, count = options.pop("clip", 1.0), options.pop("count", 1)
        more = {"gradient_clipping": clip, "gradient_accumulation_steps": count}
        plugin = DeepSpeedPlugin(hf_ds_config=config(2, **more))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=count)
        torch.manual_seed(3)
        model = Net(options.pop("names", "first second"))
        optimizer = sort(model.parameters(), **{"lr": 1e-2, **options})
        loader = torch.utils.data.DataLoader(torch.ones(rows, 8), batch_size=2)
        return accelerator, *accelerator.prepare(model, optimizer, loader, half_life(optimizer))

    def train(parts: Any, steps: int) -> list[float]:
        accelerator, engine, optimizer, loader, schedule = parts
        rates = []
        for batch, _ in zip(loader, range(steps), strict=False):
            rates.append(optimizer.param_groups[0]["lr"])
            with accelerator.accumulate(engine):
                accelerator.backward(engine(batch).square().mean())
                optimizer.step()
                schedule.step()
        return rates

    run = out / "accelerate"
    parts = begin()
    straight = train(parts, 2)
    save_state(parts[0], run)
    straight += train(parts, 2)

    def fails(parts: Any, *texts: str, **options: Any) -> None:
        folder = options.pop("folder", run)
        refusal(lambda: load_state(parts[0], folder, **options), *texts)

    text = ("AdamW saved, SGD now", "pass load_optimizer_states=False")
    fails(begin(torch.optim.SGD), *text)
    assert load_state(begin(torch.optim.SGD)[0], run, load_optimizer_states=False) == 2
    fails(begin(clip=0.5), "gradient_clipping: 1.0 saved, 0.5 now", 'on_mismatch="warn"')
    fails(begin(rows=18), "dataset_length: 16 saved, 18 now")
    fails(begin(names="first other"), "is second.weight", "it is other.weight")
    parts = begin(names="first other")
    assert load_state(parts[0], run, renamed={"second.": "other."}) == 2
    parts = begin(lr=4e-2)
    with hearing() as lines:
        assert load_state(parts[0], run) == 2
    assert any('0.04 was asked for; override={"lr"}' in line for line in lines), lines
    assert train(parts, 2) == straight[2:], straight
    parts = begin(lr=4e-2)
    assert load_state(parts[0], run, override={"lr"}) == 2
    assert train(parts, 2) == [4 * rate for rate in straight[2:]]
    for batches, lost in ((6, 0), (5, 1)):  # the third step, whose count two do not divide
        parts, folder = begin(count=2), out / f"accelerate-{batches}"
        train(parts, batches)
        with hearing() as lines:
            save_state(parts[0], folder)
        assert lost == sum("1 of 2 micro batches into a step" in line for line in lines), lines
        assert load_state(begin(count=2)[0], folder) == batches // 2
    fails(begin(count=4), "train_batch_size: 4 saved, 8 now", folder=folder)


def lightning(out: Path) -> None:
    import trainers_worker_lightning as worker
    from lightning.pytorch import Callback

    class Small(worker.Small):
        sort: Any = torch.optim.AdamW
        rate = 0.01

        def configure_optimizers(self) -> Any:
            optimizer = type(self).sort(self.parameters(), lr=type(self).rate)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    class Rates(Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    worker.Small = Small  # type: ignore[misc]
    run, rates = out / "lightning", Rates()
    worker.fit(out, 2, 2, [worker.steps(run), rates])
    straight, start = rates.rates, run / "step=6.ckpt"

    def go_on(**options: Any) -> list[float]:
        rates = Rates()
        worker.fit(out, 2, 2, [worker.steps(out / "more"), rates], start=start, **options)
        return rates.rates

    assert go_on() == straight[6:], straight
    Small.rate = 0.04
    with hearing() as lines:
        assert go_on() == straight[6:]
    assert any("0.04 was asked for" in line for line in lines), lines
    found = go_on(override={"lr"})
    expected = [4 * rate for rate in straight[6:]]
    assert all(abs(a - b) < 1e-12 for a, b in zip(found, expected, strict=True)), (found, expected)
    Small.rate, Small.sort = 0.01, torch.optim.SGD
    text = ("AdamW saved, SGD now", "load_optimizer_states=False to the strategy")
    refusal(go_on, *text)
    assert len(go_on(load_optimizer_states=False)) == 2


def main() -> None:
    import deepspeed

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    deepspeed.init_distributed(dist_backend="gloo")
    for part in sys.argv[2:]:
        globals()[part](Path(sys.argv[1]))
    print(json.dumps({"done": sys.argv[2:]}))
    leave()


if __name__ == "__main__":
    main()
