"""One rank of trainings by the Hugging Face Trainer, with its checkpoints committed and without.

Started by ``test_hf.py`` through torchrun: ``hf_worker.py OUT_DIR PART STAGE``, one function each.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate.state import AcceleratorState
from ending import leave
from fixture_specs import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.trainer_utils import get_last_checkpoint

from ckpt import Preemption
from ckpt.runs.pruning import pin
from ckpt.runs.run import Run
from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints
from converters.errors import CheckpointError

STEPS, EVERY = 4, 2
EACH = {"save_steps": 1, "eval_steps": 1}  # for what needs no step without a save
BRIEF = {**EACH, "max_steps": 1}  # for what a single save shows
EVEN, UNEVEN = 24, 16  # hidden sizes: do three ranks have equal parts of each parameter?
# The first checkpoint is the best.
RISING = {"metric_for_best_model": "loss", "greater_is_better": False, "learning_rate": 3e-1}


class Committed(CommittedCheckpoints, hf.Trainer):
    """As a user writes it."""

    timeout = 60.0


class Pushing(hf.Trainer):
    """Notes what it would push, and whether that was committed by then."""

    pushed: list[str]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        assert Path(checkpoint_folder, "manifest.json").exists(), checkpoint_folder
        self.pushed = [*getattr(self, "pushed", []), Path(checkpoint_folder).name]


class CommittedPushing(CommittedCheckpoints, Pushing):
    timeout = 60.0


class Looking(hf.Trainer):
    """Looks whether what it is about to write over counts as committed."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        assert not Path(output_dir, "manifest.json").exists(), output_dir
        super()._save(output_dir, state_dict)


class Heard(hf.TrainerCallback):
    """All losses, and where the training began."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.start = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses += [value for key, value in logs.items() if key in ("loss", "eval_loss")]


def config(stage: int, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    if stage == 3:
        zero = {
            "stage3_param_persistence_threshold": 10,
            "stage3_gather_16bit_weights_on_model_save": True,
            **zero,
        }
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def tokenizer() -> Any:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, 64)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make(
    kind: type[hf.Trainer],
    out: Path,
    stage: int,
    peft: bool = False,
    hidden: int = EVEN,
    rows: int = 32,
    **more: Any,
) -> tuple[Any, Heard]:
    """A Trainer of a tiny Llama with dropout, the same at every call; an epoch is of ``rows``."""
    AcceleratorState._reset_state(True)
    zero, callbacks = more.pop("zero", {}), more.pop("callbacks", [])
    deepspeed = more.pop("deepspeed", None) or config(stage, **zero)
    heard = Heard()
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": EVERY,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "bf16": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1234,
        **more,
    }
    args = hf.TrainingArguments(output_dir=str(out), deepspeed=deepspeed, **options)
    llama = tiny_llama(max_position_embeddings=32, attention_dropout=0.1, tie_word_embeddings=True)
    llama.hidden_size, llama.num_hidden_layers = hidden, 1
    torch.manual_seed(1234)
    model: Any = hf.AutoModelForCausalLM.from_config(llama)
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(4, 64, (rows, 8), generator=torch.Generator().manual_seed(3)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = kind(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        processing_class=tokenizer(),
        callbacks=[heard, *callbacks],
    )
    return trainer, heard


def digest(trainer: Any) -> str:
    """Of this rank's weights, optimizer state and random numbers."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8)
            found.update(data.numpy().tobytes())
        elif isinstance(value, dict):
            for inner in value.values():
                add(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                add(inner)

    engine = trainer.model_wrapped
    add(engine.optimizer.state_dict())
    for parameter in engine.module.parameters():
        add(getattr(parameter, "ds_tensor", parameter))
    found.update(str(torch.rand(1)).encode())
    return found.hexdigest()


def first(call: Any) -> None:
    """Something that rank 0 does while the others wait."""
    dist.barrier()
    if not dist.get_rank():
        call()
    dist.barrier()


def names(run: Path) -> list[str]:
    """The committed checkpoints of a run, by step."""
    return [c.name for c in Run(run).checkpoints() if c.committed]


def trained(kind: type[hf.Trainer], out: Path, stage: int, **more: Any) -> Any:
    """What a training came to: losses and digest."""
    source = more.pop("source", None)
    trainer, heard = make(kind, out, stage, **more)
    trainer.train(resume_from_checkpoint=None if source is None else str(source))
    return heard.losses, digest(trainer), heard.start


FORMS: dict[str, tuple[type[hf.Trainer], list[type[hf.TrainerCallback]]]] = {
    "trainer": (hf.Trainer, []),
    "class": (Committed, []),
    "callback": (hf.Trainer, [CheckpointCallback]),
}
# Which forms go on from a checkpoint of the class, and from one of the callback, by stage: together
# all from both. What these two have saved is the same, as the test requires. The last one commits.
WIDE = {
    2: {"mixin": ("trainer", "class", "callback"), "callback": ("trainer", "class")},
    3: {"mixin": ("class",), "callback": ("callback",)},
}


def same(out: Path, stage: int) -> None:
    """All forms side by side, and resuming from what one of them committed."""
    three = os.environ["WORLD_SIZE"] == "3"  # before there is a process group
    going_on(out, stage, {"callback": ("class",)} if three else {"mixin": ("trainer", "class")})


def going_on(out: Path, stage: int, forms_of: Mapping[str, Sequence[str]]) -> None:
    """All forms side by side, and resuming from what they committed, in some of the forms.

    With three ranks also a model whose parameters these cannot share evenly. DeepSpeed leaves the
    rest of the last rank's part as it found it in memory (``torch.empty`` in 0.19.8
    ``zero/partition_parameters.py: _partition_param``), so that no two trainings end in the same
    digest; the losses are the same.
    """
    (out / "here").mkdir(exist_ok=True)
    os.chdir(out / "here")  # relative paths in what is saved
    stock = trained(hf.Trainer, Path("stock"), stage)
    callback = CheckpointCallback(timeout=60.0)
    assert trained(Committed, Path("mixin"), stage) == stock
    assert trained(hf.Trainer, Path("callback"), stage, callbacks=[callback]) == stock
    for name, forms in forms_of.items():
        run = Path(name)
        assert names(run) == ["checkpoint-2", "checkpoint-4"]
        first(lambda run=run: (run / "checkpoint-4/manifest.json").rename(run / "torn"))
        newest = Run(run).newest()
        assert newest is not None and newest.name == "checkpoint-2", newest
        dist.barrier()
        for kind, callbacks in map(FORMS.__getitem__, forms):
            more = {"callbacks": [each() for each in callbacks], "source": newest.folder}
            losses, end, start = trained(kind, run, stage, **more)
            assert start == 2 and end == stock[1], (run, kind, start)
            assert losses == stock[0][-len(losses) :], (losses, stock[0])
            assert len(losses) == 3, losses
        assert names(run) == ["checkpoint-2", "checkpoint-4"]
    if dist.get_world_size() == 3:
        uneven = [
            trained(kind, Path(name), stage, hidden=UNEVEN, **BRIEF)[0]
            for name, kind in (("stock-uneven", hf.Trainer), ("mixin-uneven", Committed))
        ]
        assert uneven[0] == uneven[1], uneven


def wide(out: Path, stage: int) -> None:
    """The same, resuming in all forms; loading the best at the end; a PEFT model."""
    going_on(out, stage, WIDE[stage])
    loaded, ends = [], {}
    for name, kind in (("stock-best", hf.Trainer), ("mixin-best", Committed)):
        loads = {"load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 2}
        trainer, _ = make(kind, Path(name), stage, **RISING, **EACH, **loads)
        trainer.train()
        loaded.append(digest(trainer))
        ends[name] = [trainer.state.best_model_checkpoint, trainer.state.best_metric]
    assert loaded[0] == loaded[1]
    (out / f"best{dist.get_rank()}.json").write_text(json.dumps(ends))
    peft = {**BRIEF, "peft": True, "eval_strategy": "no"}
    adapter = trained(hf.Trainer, Path("stock-peft"), stage, **peft)
    assert trained(Committed, Path("mixin-peft"), stage, **peft) == adapter
    callbacks = [CheckpointCallback()]
    again = trained(hf.Trainer, Path("callback-peft"), stage, callbacks=callbacks, **peft)
    assert again == adapter


def keeping(out: Path, stage: int) -> None:
    """Rotation; weights only; weights where the Trainer leaves them out; being asked to stop.

    In stage 3 what this has another way for: the weights.
    """
    rotates(out, 2)
    for run, kind, callbacks in (
        (out / "weights-mixin", Committed, []),
        (out / "weights-callback", hf.Trainer, [CheckpointCallback()]),
    ):
        trained(kind, run, stage, callbacks=callbacks, save_only_model=True, max_steps=2, **EACH)
        dist.barrier()
        found = Run(run).newest(None)
        assert Run(run).newest() is None and found is not None and found.tier == "weights"
        assert (run / "latest").read_text() == "checkpoint-2"
    writes_over(out / "over", 2)
    stops(out, 2)
    ungathered(out)


def rotates(out: Path, stage: int) -> None:
    """The Trainer's limit, beside which the best and a pinned checkpoint stay."""
    mine, stock = out / "mine", out / "theirs"

    class Pinning(hf.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and state.is_world_process_zero:
                pin(Run(Path(args.output_dir)).find("2"), True)

    for run, kind, callbacks in (
        (mine, CommittedPushing, [Pinning()]),
        (stock, hf.Trainer, [CheckpointCallback(), Pinning()]),
    ):
        (run / "checkpoint-final").mkdir(parents=True, exist_ok=True)
        many = {**RISING, **EACH, "max_steps": 4, "save_total_limit": 1}
        trainer, _ = make(kind, run, stage, callbacks=callbacks, **many)
        trainer.args.push_to_hub = run == mine
        trainer.train()
        dist.barrier()
        assert trainer.state.best_model_checkpoint == str(run / "checkpoint-1")
        assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"], names(run)
        assert (run / "checkpoint-final").is_dir()
        if run == mine:
            assert trainer.pushed == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
        assert (run / "best").read_text() == "checkpoint-1/global_step1"


def writes_over(over: Path, stage: int) -> None:
    """What lies where a checkpoint is saved counts as committed no longer, in each strategy."""
    for strategy, more in (
        ("steps", {}),
        ("best", RISING),
        ("epoch", {"max_steps": -1, "num_train_epochs": 1, "rows": 12}),  # three steps
    ):
        first(lambda: (over / "checkpoint-3").mkdir(parents=True, exist_ok=True))
        first(lambda: (over / "checkpoint-3/manifest.json").write_text("an old one"))
        callbacks = [CheckpointCallback(preflight=False)]
        options = {**EACH, "max_steps": 2, "save_strategy": strategy, **more}
        trained(Looking, over, stage, callbacks=callbacks, **options)
        dist.barrier()
        new = ["checkpoint-3"] if strategy == "epoch" else []
        assert names(over) == ["checkpoint-1", "checkpoint-2", *new], strategy


def stops(out: Path, stage: int) -> None:
    """Asked to stop, both forms save the step that all ranks stop at."""
    for name, callbacks, kind in (
        ("stop-mixin", [], type("Stopping", (Committed,), {"preemption": Preemption()})),
        ("stop-callback", [CheckpointCallback(preemption=Preemption())], hf.Trainer),
    ):
        asked = Asked()
        trainer, _ = make(kind, out / name, stage, callbacks=[asked, *callbacks], save_steps=5)
        try:
            trainer.train()
        except SystemExit as exit:
            assert exit.code == 75
        else:
            raise AssertionError("it went on")
        dist.barrier()
        assert names(out / name) == ["checkpoint-2"], names(out / name)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Asked(hf.TrainerCallback):
    """Rank 1 is sent a signal in the first step; both stop after the second."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def ungathered(out: Path) -> None:
    """ZeRO-3 without the gather flag: weights are streamed, and nothing is written twice."""
    brief = {**EACH, "max_steps": 2}
    trained(hf.Trainer, out / "gathered", 3, **brief)
    zero = {"stage3_gather_16bit_weights_on_model_save": False}
    for name, weights in (("left-out", None), ("streamed", "bf16")):
        kind = type("Streaming", (Committed,), {"weights": weights})
        trainer, _ = make(kind, out / name, 3, zero=zero, **brief)
        saves = []
        prepare = trainer._prepare_for_training

        def prepared(*args: Any, prepare: Any = prepare, saves: Any = saves, **more: Any) -> Any:
            found = prepare(*args, **more)
            engine = found[0]
            save = engine.save_checkpoint

            def counted(*args: Any, exclude_frozen_parameters: bool = False, **more: Any) -> Any:
                saves.append(1)
                return save(*args, **more)

            engine.save_checkpoint = counted
            return found

        trainer._prepare_for_training = prepared
        trainer.train()
        assert len(saves) == 2, saves
        trainer.save_model()  # the last line of a script
        dist.barrier()
        assert len(saves) == (3 if weights is None else 2), saves


class Failing(Committed):
    """Fails at step 2 on one rank, at one place."""

    rank, place = 0, "_save"

    def _fails(self, place: str) -> None:
        if (self.state.global_step, dist.get_rank(), place) == (2, self.rank, self.place):
            raise OSError(28, "No space left on device", "model.safetensors")


class InModel(Failing):
    """Where rank 0 writes the model; the mixin is between."""


class InRandom(Failing):
    rank, place = 1, "_save_rng_state"

    def _save_rng_state(self, output_dir: str) -> None:
        self._fails("_save_rng_state")
        super()._save_rng_state(output_dir)


class Full(hf.Trainer):
    """The Trainer of somebody whose disk is full at step 2."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        if self.state.global_step == 2 and dist.get_rank() == 0:
            raise OSError(28, "No space left on device", "model.safetensors")
        super()._save(output_dir, state_dict)


class FullCommitted(CommittedCheckpoints, Full):
    timeout = 60.0


def failing(out: Path, stage: int) -> None:
    """A rank that fails: told on all, nothing committed; and going on without."""
    brief = {**EACH, "max_steps": 3, "eval_strategy": "no"}
    stock = trained(hf.Trainer, out / "stock", stage, **brief)
    told = {}
    for name, kind in (("model", FullCommitted), ("random", InRandom)):
        run = out / name
        trainer, _ = make(kind, run, stage, **brief)
        try:
            trainer.train()
        except CheckpointError as error:
            told[name] = str(error)
        dist.barrier()
        assert names(run) == ["checkpoint-1"]
        left = [p.name for p in run.iterdir() if "checkpoint-" in p.name]
        assert left == ["checkpoint-1"], left
        assert get_last_checkpoint(str(run)) == str(run / "checkpoint-1")
        going_on = type("GoingOn", (kind,), {"on_failure": "warn"})
        dist.barrier()
        assert trained(going_on, out / f"{name}-on", stage, **brief) == stock
        assert names(out / f"{name}-on") == ["checkpoint-1", "checkpoint-3"]
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told))


class Projector(hf.Trainer):
    """As LLaVA's: it saves what it trains, and nothing of the engine."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial), name)
        folder.mkdir(parents=True, exist_ok=True)
        if not dist.get_rank():
            torch.save({}, folder / "mm_projector.bin")


class CommittedProjector(CommittedCheckpoints, Projector):
    timeout = 60.0


def stateless(out: Path, stage: int) -> None:
    """A class that saves no state of the engine is refused at its first save, in both forms."""
    told = {}
    for name, kind, callbacks in (
        ("class", CommittedProjector, []),
        ("callback", Projector, [CheckpointCallback(timeout=60.0)]),
    ):
        brief = {**BRIEF, "eval_strategy": "no"}
        trainer, _ = make(kind, out / name, stage, callbacks=callbacks, **brief)
        try:
            trainer.train()
        except CheckpointError as error:
            told[name] = str(error)
        dist.barrier()
        assert names(out / name) == [] and not (out / name / "latest").exists(), name
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told))


class Killed(Committed):
    """Rank 1 is killed in the save of step 2."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def killed(out: Path, stage: int) -> None:
    """Ends with a lost rank."""
    make(Killed, out / "mixin", stage, eval_strategy="no", **EACH)[0].train()


class Midway(Committed):
    """Rank 0 fails inside DeepSpeed, where the other already waits for it in a barrier."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 2 and dist.get_rank() == 0:
            self.model_wrapped._copy_recovery_script = self._full
        super()._save_optimizer_and_scheduler(output_dir)

    def _full(self, folder: str) -> None:
        raise OSError(28, "No space left on device", "zero_to_fp32.py")


def midway(out: Path, stage: int) -> None:
    """Ends with an error on each rank, of the first as its connection ends."""
    try:
        make(Midway, out / "mixin", stage, eval_strategy="no", **EACH)[0].train()
    except CheckpointError as error:
        (out / f"told{dist.get_rank()}").write_text(str(error))
        raise


def main() -> None:
    globals()[sys.argv[2]](Path(sys.argv[1]), int(sys.argv[3]))
    leave()


if __name__ == "__main__":
    main()
