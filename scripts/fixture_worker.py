"""One rank of a fixture run: train a tiny model with real DeepSpeed on CPU, save it, and record
what the live engine held, so that tests can compare a conversion with something the checkpoint
files themselves did not tell.

Started by ``make_fixtures.py`` through torchrun: ``fixture_worker.py OUT_DIR NAME [NAME ...]``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fixture_specs import SPECS, WORDS, Json, Spec, ds_config, tiny_llama
from torch import nn


class Block(nn.Module):
    """LayerNorm and two Linears whose sizes no world size divides."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.relu(self.up(self.ln(x))))
        return out


class Rows(nn.Embedding):
    """An embedding whose rows past those in use are constant, so that big ones compress."""

    def reset_parameters(self) -> None:  # here zero.Init has not taken the weight away yet
        super().reset_parameters()
        self.weight.data[WORDS:] = 0.5


class Tiny(nn.Module):
    """A language model with every kind of state a checkpoint may hold."""

    def __init__(self, spec: Spec, dim: int = 7, inner: int = 9) -> None:
        super().__init__()
        self.embed = Rows(spec.vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, inner) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, spec.vocab, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight
        self.frozen = nn.Linear(dim, 3).requires_grad_(False)
        if spec.zero_sized:
            # In a module of their own, never called: ZeRO-3 cannot fetch them for a forward pass.
            self.empty = nn.Embedding(0, 3)
            self.empty.other = nn.Parameter(torch.zeros(4, 0))
            self.empty.frozen = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.register_buffer("scale", torch.linspace(0.1, 1.7, 11))
        self.register_buffer("positions", torch.arange(5) * 1_000_000_007)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1, :WORDS].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        total: torch.Tensor = loss + self.frozen(x).float().pow(2).mean()
        return total


def param_groups(model: nn.Module, kind: str) -> list[Json]:
    """Optimizer groups of the trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    if kind == "one":
        return [{"params": params}]
    sizes = [len(getattr(p, "ds_shape", p.shape)) for p in params]
    decay = {
        "params": [p for p, n in zip(params, sizes, strict=True) if n > 1],
        "weight_decay": 0.1,
    }
    rest = {
        "params": [p for p, n in zip(params, sizes, strict=True) if n <= 1],
        "weight_decay": 0.0,
    }
    empty: list[Json] = [{"params": [], "weight_decay": 0.3}] if kind == "empty" else []
    return [decay, *empty, rest]


def _flat_groups(engine: Any) -> Iterator[tuple[list[Any], list[int], list[torch.Tensor]]]:
    """Per flattened group: its parameters in flat order, their offsets, master and moments."""
    opt = engine.optimizer
    for index, mine in enumerate(opt.single_partition_of_fp32_groups):
        state = opt.optimizer.state[mine]
        whole = []
        for part in (mine.detach(), state["exp_avg"], state["exp_avg_sq"]):
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part.contiguous())
            whole.append(torch.cat(parts))
        yield opt.round_robin_bit16_groups[index], opt.round_robin_bit16_offsets[index], whole


def _masters(engine: Any, spec: Spec) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """Each trainable parameter with its live fp32 master, exp_avg and exp_avg_sq.

    Stages 1 and 2 are gathered and cut by the optimizer's own flat order: DeepSpeed's
    safe_get functions return other parameters' values under round_robin_gradients and find no
    moments beyond the first group; where they are right they must agree with it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    moments = ("exp_avg", "exp_avg_sq")
    opt = engine.optimizer
    if spec.stage == 0 and spec.dtype == "fp32":
        for group in opt.param_groups:
            for param in group["params"]:
                yield param, [param.detach(), *(opt.state[param][key] for key in moments)]
    elif hasattr(opt, "fp32_groups_flat"):
        for params, flat in zip(opt.fp16_groups, opt.fp32_groups_flat, strict=True):
            start, state = 0, opt.optimizer.state[flat]
            for param in params:
                whole = (flat.detach(), *(state[key] for key in moments))
                yield param, [t[start : start + param.numel()].view_as(param) for t in whole]
                start += param.numel()
    elif hasattr(opt, "fp32_groups"):
        for params, masters in zip(opt.fp16_groups, opt.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                state = opt.optimizer.state[master]
                yield param, [master.detach(), *(state[key] for key in moments)]
    elif spec.stage < 3:
        shuffled = spec.zero.get("round_robin_gradients", False)
        for params, starts, flats in _flat_groups(engine):
            for param, start in zip(params, starts, strict=True):
                cut = [t[start : start + param.numel()].view_as(param) for t in flats]
                if not shuffled and not torch.equal(safe_get_full_fp32_param(param), cut[0]):
                    raise AssertionError("the optimizer's flat order is not what it was read as")
                yield param, cut
    else:
        for param in engine.module.parameters():
            if param.requires_grad and param.ds_numel:
                got = [safe_get_full_optimizer_state(param, key) for key in moments]
                yield param, [safe_get_full_fp32_param(param), *got]


def live_state(engine: Any, spec: Spec) -> dict[str, torch.Tensor]:
    """What the engine holds now, keyed ``fp32/ exp_avg/ exp_avg_sq/ live/ buffer/`` + name.

    Collective: every rank must call it. Tied names appear under each of their names.
    """
    from deepspeed import zero

    module = engine.module
    names: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    live: dict[str, torch.Tensor] = {}

    def keep(prefix: str, param: Any, value: torch.Tensor) -> None:
        for name in names[id(param)]:
            live[f"{prefix}/{name}"] = value.detach().contiguous().clone()

    for param in module.parameters():
        with zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            keep("live", param, param)
            if param.requires_grad and not param.numel():
                keep("fp32", param, param.float())
    for param, values in _masters(engine, spec):
        for prefix, value in zip(("fp32", "exp_avg", "exp_avg_sq"), values, strict=True):
            keep(prefix, param, value)
            shown = live[f"live/{names[id(param)][0]}"]
            if prefix == "fp32" and not torch.equal(value.to(shown.dtype).view_as(shown), shown):
                raise AssertionError(f"{names[id(param)]}: master does not round to the weight")
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            live[f"buffer/{name}"] = buffer.detach().contiguous().clone()
    return live


def train_tiny(name: str, out: Path) -> None:
    """Two steps of the tiny model, saved under ``out/name``."""
    import deepspeed
    from safetensors.torch import save_file

    spec = SPECS[name]
    config = ds_config(spec)
    torch.manual_seed(1234)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=spec.stage == 3):
        model = Tiny(spec)
    groups = param_groups(model, spec.groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    torch.manual_seed(100 + torch.distributed.get_rank())
    for _ in range(2):
        loss = engine(torch.randint(WORDS, (2, 6)))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(
        str(out / name),
        client_state={"epoch": 1},
        exclude_frozen_parameters=spec.exclude_frozen,
    )
    live = live_state(engine, spec)
    if torch.distributed.get_rank() == 0:
        save_file(live, out / name / "live.safetensors")
    torch.distributed.barrier()
    engine.destroy()


def llama_trainer(name: str, out: Path) -> Any:
    """The Hugging Face Trainer of a tiny Llama with a real tokenizer, for two steps in ``out``."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    spec = SPECS[name]
    config = ds_config(spec)
    del config["optimizer"]
    config["train_micro_batch_size_per_gpu"] = "auto"
    if spec.stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 10
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # so that the paths inside the saved files are relative
    args = hf.TrainingArguments(
        output_dir=name,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        ddp_backend="gloo",
        bf16=True,
        deepspeed=config,
        report_to="none",
        disable_tqdm=True,
        seed=1234,
    )
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    vocab |= {f"w{i}": i for i in range(4, 64)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    llama = tiny_llama(max_position_embeddings=32, tie_word_embeddings=spec.tied)
    torch.manual_seed(1234)
    model = hf.AutoModelForCausalLM.from_config(llama)
    rows = torch.randint(4, 64, (16, 8)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    return hf.Trainer(model, args, train_dataset=data, processing_class=tokenizer)


def train_llama(name: str, out: Path) -> None:
    """Two steps by the Trainer, saved with its tokenizer, and what the engine held then."""
    from safetensors.torch import save_file

    trainer = llama_trainer(name, out)
    trainer.train()
    live = live_state(trainer.model_wrapped, SPECS[name])
    if torch.distributed.get_rank() == 0:
        save_file(live, Path(name) / "live.safetensors")
    torch.distributed.barrier()


def main() -> None:
    """Make the named fixtures, all of the same world size, one after the other."""
    out = Path(sys.argv[1]).resolve()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes it all the same.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    for name in sys.argv[2:]:
        (train_llama if SPECS[name].trainer else train_tiny)(name, out)
        if torch.distributed.get_rank() == 0:
            print(f"made {name}", flush=True)


if __name__ == "__main__":
    main()
