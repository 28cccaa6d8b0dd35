"""Weights that need no conversion: models, adapters, and what ckpt keeps of a training."""

from __future__ import annotations

from converters.detect import filenames
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.storage import bounded_json, first_bytes, misplaced_files, stores

_READER = "converters.formats.weight_files:read"
_OPENS = (
    "ckpt.open reads it as it is, from_pretrained loads the folder if its config.json is there "
    "(PeftModel.from_pretrained, if it is an adapter), and ckpt push publishes it if nothing is "
    "missing"
)
_WHOLE = "it has the weights already, {evidence}, so there is nothing to convert: {remedy}"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_MODELS = (*filenames.SAFETENSORS, *filenames.TORCH_BIN)
_MAX_MANIFEST_BYTES = 64 << 20


def hub_cache(look: Look) -> str | None:
    """A repository in the cache of the Hub client: the paths of its snapshots."""
    folder = look.path / "snapshots"
    if not stores.is_folder(folder) or not stores.exists(look.path / "refs"):
        return None
    snapshots = stores.names(folder)
    paths = ", ".join(str(folder / name) for name in snapshots[:4])
    return paths or "it has none"


def misplaced_weights(look: Look) -> str | None:
    """A file of weights in whose place lies something else: a pointer, a web page."""
    name = look.has((*_MODELS, *filenames.ADAPTERS)) if look.is_folder else None
    why = misplaced_files.file(look.path / name) if name else None
    return None if why is None else f"{name} in it {why}"


def weights_tier(look: Look) -> str | None:
    """A checkpoint that ckpt saved as weights alone."""
    is_named_so = look.path.resolve().name.startswith("weights-")
    return filenames.MANIFEST if is_named_so and _tier(look) == "weights" else None


def slimmed(look: Look) -> str | None:
    """A checkpoint that ``ckpt slim`` took the states from."""
    return filenames.MANIFEST if _tier(look) == "weights" else None


def _tier(look: Look) -> str | None:
    """The tier in the folder's manifest; ``None`` if there is none that can be read."""
    path = look.path / filenames.MANIFEST
    if look.has([filenames.MANIFEST]) is None or stores.status(path).size > _MAX_MANIFEST_BYTES:
        return None
    try:
        data = stores.content(path)
    except OSError:
        return None

    try:
        manifest = bounded_json.loads(data)
    except ValueError:
        return None

    tier = manifest.get("tier") if isinstance(manifest, dict) else None
    return tier if isinstance(tier, str) else None


def adapter(look: Look) -> str | None:
    """An adapter of PEFT, with no weights of a model beside it."""
    if look.is_file:
        return look.path.name if look.path.name in filenames.ADAPTERS else None
    has_model = look.has(_MODELS)
    return None if has_model else look.has(filenames.ADAPTERS)


def trainer_record(look: Look) -> str | None:
    """The Trainer's record of its progress; it is JSON."""
    is_one = look.is_file and look.path.name == filenames.TRAINER_STATE
    return str(look.path.parent) if is_one else None


def trainer_file(look: Look) -> str | None:
    """A file that a trainer keeps beside the weights:
    optimizer, random states, arguments."""
    is_one = look.is_file and filenames.OF_TRAINER.fullmatch(look.path.name)
    return str(look.path.parent) if is_one and not look.is_unfinished else None


def trainer(look: Look) -> str | None:
    """A checkpoint of the Trainer with the optimizer in one file,
    and so without DeepSpeed."""
    has_optimizer = look.has([filenames.TRAINER_STATE]) and look.has(filenames.OPTIMIZERS)
    if not has_optimizer:
        return None
    return _model(look) or look.has(filenames.ADAPTERS)


def gathered(look: Look) -> str | None:
    """Weights that a training saved or gathered, without the states that they are of."""
    is_trained = look.has([filenames.TRAINER_STATE, filenames.SCRIPT])
    return _model(look) if is_trained else None


def accelerate(look: Look) -> str | None:
    """A folder of Accelerate's ``save_state`` with weights in it."""
    has_states = look.match(filenames.RANDOM_STATES)
    return _model(look) if has_states else None


def safetensors(look: Look) -> str | None:
    """A model in safetensors: a folder with a file, or with an index of shards."""
    return _model(look, filenames.SAFETENSORS)


def safetensors_file(look: Look) -> str | None:
    """A single file in safetensors."""
    is_one = look.path.suffix == ".safetensors" or first_bytes.is_safetensors(look.head)
    return look.path.name if look.is_file and is_one and not look.is_unfinished else None


def torch_bin(look: Look) -> str | None:
    """A model in files of ``torch.save``: a folder with one, or with an index of shards."""
    return _model(look, filenames.TORCH_BIN)


def torch_file(look: Look) -> str | None:
    """A single file of ``torch.save``."""
    return look.path.name if look.is_file and _is_torch_file(look) else None


def _model(look: Look, names: tuple[str, ...] = _MODELS) -> str | None:
    """The file of a model's weights,
    or the index of its shards if none is still to come."""
    name = look.has(names)
    if name is None or not name.endswith(".json"):
        return name
    return None if any(_is_coming(shard, look.names) for shard in look.names) else name


def _is_coming(name: str, names: tuple[str, ...]) -> bool:
    """Whether a file is a shard that a download left before its end."""
    stem, _, suffix = name.rpartition(".")
    is_shard = stem.endswith((".safetensors", ".bin")) and stem not in names
    return is_shard and f".{suffix.lower()}" in misplaced_files.UNFINISHED


def _is_torch_file(look: Look) -> bool:
    if look.is_unfinished:
        return False
    return look.path.suffix in _TORCH_SUFFIXES or look.begins_as_torch_save


def lightning_file(look: Look) -> str | None:
    """A checkpoint of Lightning in one file."""
    if look.is_file and look.path.suffix == ".ckpt":
        return look.path.name
    return None


KINDS = (
    Kind(
        name="hub-cache",
        title="repository in the cache of the Hub client",
        recognized_by="`snapshots/` and `refs/`",
        sign=hub_cache,
        statement="is a repository in the cache of the Hub client",
        remedy="name a snapshot: {evidence}",
        refusal="{statement}; {remedy}",
    ),
    Kind(
        name="misplaced-weights",
        title="model whose weights are not there",
        recognized_by="a Git LFS pointer, a web page or the like in the place of the weights",
        sign=misplaced_weights,
        statement="is a model whose weights are not there: {evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="weights-tier",
        title="checkpoint of weights alone, saved by ckpt",
        recognized_by='`manifest.json` with `"tier": "weights"` in a folder `weights-N`',
        sign=weights_tier,
        reader=_READER,
        statement="is a checkpoint of weights alone ({evidence}), which a training cannot go on "
        "from",
        remedy=_OPENS,
        refusal="{statement}; it has the weights already, so there is nothing to convert: {remedy}",
    ),
    Kind(
        name="slimmed",
        title="slimmed checkpoint",
        recognized_by='`manifest.json` with `"tier": "weights"` in another folder',
        sign=slimmed,
        reader=_READER,
        statement="is a slimmed checkpoint ({evidence}), whose states are gone",
        remedy=_OPENS,
        refusal="{statement}; it has the weights already, so there is nothing to convert: {remedy}",
    ),
    Kind(
        name="trainer",
        title="checkpoint of the Trainer without DeepSpeed",
        recognized_by="`trainer_state.json`, `optimizer.pt` and weights",
        sign=trainer,
        reader=_READER,
        statement="is a checkpoint of the Trainer without DeepSpeed",
        remedy="ckpt.open reads the weights, and if nothing is missing "
        "trainer.train(resume_from_checkpoint=...) goes on from it, and ckpt push publishes them",
        refusal="{statement}; " + _WHOLE,
    ),
    Kind(
        name="adapter",
        title="adapter of PEFT",
        recognized_by="`adapter_model.safetensors` or `adapter_model.bin`, and no model beside it",
        sign=adapter,
        reader=_READER,
        statement="is an adapter of PEFT",
        remedy="PeftModel.from_pretrained reads it, ckpt.open its tensors, and ckpt push "
        "publishes it",
        refusal="{statement} without state files of DeepSpeed; it has the adapter already, "
        "{evidence}, so there is nothing to convert: {remedy}",
    ),
    Kind(
        name="gathered-16bit",
        title="weights that a training saved",
        recognized_by="weights of a model beside `trainer_state.json` or `zero_to_fp32.py`",
        sign=gathered,
        reader=_READER,
        statement="is a model that a training saved, without state files of DeepSpeed "
        "(save_only_model, save_16bit_model, or no DeepSpeed)",
        remedy=_OPENS,
        refusal="{statement}; " + _WHOLE,
    ),
    Kind(
        name="accelerate",
        title="checkpoint of Accelerate without DeepSpeed",
        recognized_by="`random_states_R.pkl` and the weights of a model",
        sign=accelerate,
        reader=_READER,
        statement="is a checkpoint of Accelerate without DeepSpeed",
        remedy="ckpt.open reads the weights, and if nothing is missing accelerator.load_state "
        "goes on from it, and ckpt push publishes them",
        refusal="{statement}; " + _WHOLE,
    ),
    Kind(
        name="safetensors",
        title="weights in safetensors",
        recognized_by="`model.safetensors` or its index",
        sign=safetensors,
        reader=_READER,
        statement="is a model in safetensors",
        remedy=_OPENS,
        refusal="{statement}, without state files of DeepSpeed; " + _WHOLE,
    ),
    Kind(
        name="trainer-record",
        title="record of the Trainer",
        recognized_by="the name, `trainer_state.json`",
        sign=trainer_record,
        statement="is what the Trainer wrote down of its progress (JSON), without weights",
        remedy="the checkpoint is its folder: {evidence}",
        refusal="{statement}; {remedy}",
    ),
    Kind(
        name="trainer-file",
        title="single file of a trainer's checkpoint",
        recognized_by="the name: `optimizer.pt`, `rng_state_R.pth`, `training_args.bin` and so on",
        sign=trainer_file,
        reader=_READER,
        of_states=True,
        statement="is one file of a checkpoint of the Trainer or Accelerate, without weights",
        remedy="the checkpoint is its folder: {evidence}",
        refusal="{statement}; ckpt show and ckpt.open read the values in it, and {remedy}",
    ),
    Kind(
        name="lightning-file",
        title="checkpoint of Lightning in one file",
        recognized_by="the suffix `.ckpt`",
        sign=lightning_file,
        reader=_READER,
        statement="is a .ckpt file, such as Lightning saves",
        remedy="load_from_checkpoint reads it, and ckpt.open the weights in it",
        refusal="{statement}, without state files of DeepSpeed; " + _WHOLE,
    ),
    Kind(
        name="torch-bin",
        title="weights in files of torch.save",
        recognized_by="`pytorch_model.bin` or its index",
        sign=torch_bin,
        reader=_READER,
        statement="is a model in files of torch.save",
        remedy=_OPENS,
        refusal="{statement}, without state files of DeepSpeed; " + _WHOLE,
    ),
    Kind(
        name="safetensors-file",
        title="single file of weights in safetensors",
        recognized_by="the suffix `.safetensors`, or the first bytes",
        sign=safetensors_file,
        reader=_READER,
        statement="is a file of weights in safetensors",
        remedy="ckpt.open and safetensors.safe_open read it as it is",
        refusal="{statement}, so there is nothing to convert: {remedy}",
    ),
    Kind(
        name="torch-file",
        title="single file of torch.save",
        recognized_by="the suffix `.bin`, `.pt` or `.pth`, or the first bytes",
        sign=torch_file,
        reader=_READER,
        statement="is a file of torch.save",
        remedy="ckpt.open reads the tensors in it as they are",
        refusal="{statement}, without other files of a checkpoint, so there is nothing to convert: "
        "{remedy}",
    ),
)
