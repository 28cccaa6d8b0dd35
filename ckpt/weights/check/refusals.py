"""Why an output would not load, as errors for a user."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ckpt.weights import advice
from ckpt.weights.layouts import framework_layout
from ckpt.weights.reader import inner_models, losses
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.fields import Size
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.losses import Loss
from converters.errors import CheckpointError
from converters.options import BASE, CHECK, CONFIG, NAMES, PART, RENAME, STRIP
from converters.words import some


def unloadable(
    reader: str,
    fit: Fit,
    missing: list[str],
    loss: Loss,
    audience: Audience,
    remedy: str,
) -> CheckpointError:
    """The error for names that do not fit; ``remedy`` is one more advice, or empty."""
    if missing:
        present_text = (
            f"the checkpoint has {some(sorted(fit.unexpected))} instead"
            if fit.unexpected
            else f"the checkpoint has {fit.present:,} of {fit.required:,} names"
        )
        problem = (
            f"{len(missing):,} of its {fit.required:,} names are missing, such as "
            f"{some(sorted(missing))}; {present_text}"
        )
        # Where no name is known, nothing is said of layers: they have other names.
        problem += f"; {loss.reason}" if loss.reason and fit.present else ""
    else:
        problem = losses.sentence(loss)

    parts_advice = inner_models.advice(fit.read.values(), audience)
    framework = framework_layout.framework_of(sorted(fit.unexpected), audience.config)
    if framework is not None and missing:
        parts_advice = f"these look like {framework} names: {NAMES('hf')} says what hinders it"
    return CheckpointError(
        f"{audience.root}: {reader}, {audience.origin}, would not load these "
        f"weights{'' if missing else ' whole'}: {problem}; "
        f"{source(audience)}{parts_advice}{'; ' if parts_advice else ''}change names with "
        f"{STRIP}, {RENAME} or {PART}, take another configuration with {CONFIG}, or "
        f"{advice.write_as_stored()}{'; ' if remedy else ''}{remedy}",
        "unloadable",
    )


def unmerged(reader: str, fit: Fit, missing: list[str], audience: Audience) -> CheckpointError:
    """The error for a merged model that neither checkpoint nor base has whole."""
    return CheckpointError(
        f"{audience.root}: {reader} of the config.json that is written wants "
        f"{fit.required:,} names, and {len(missing):,} of them are in neither the "
        f"checkpoint nor the base, such as {some(sorted(missing))}: the base or "
        "config.json is of another model than the trained one, or these tensors were "
        "added to the base, frozen, and not saved with the trained ones; name the base "
        f"that was trained on with {BASE}, or its configuration with {CONFIG}; "
        f"{CHECK('none')} writes what is there; {advice.ask_transformers()}",
        "unloadable",
    )


class AbsurdConfigError(CheckpointError):
    """A number in config.json that no model has, with which nobody should be asked to
    build one: that would take all time and memory."""


def absurd(reader: str, values: Mapping[str, object], audience: Audience) -> AbsurdConfigError:
    """The error for a number of layers that no model has."""
    path, value = next(iter(values.items()))
    return AbsurdConfigError(
        f"{audience.root}: config.json says {path} {json.dumps(value)}, with which no "
        f"{reader} can be built; {source(audience)}take another configuration with "
        f"{CONFIG}, or {advice.write_as_stored()}; {advice.ask_transformers()}",
        "unloadable",
    )


def other_shapes(reader: str, size: Size, audience: Audience) -> CheckpointError:
    """The error for tensors of other sizes than config.json says."""
    return CheckpointError(
        f"{audience.root}: {reader} of config.json has other shapes: {size}; "
        f"{source(audience)}take the configuration of this model with {CONFIG}, or "
        f"{advice.write_as_stored()}; {advice.ask_transformers()}",
        "unloadable",
    )


def source(audience: Audience) -> str:
    """Where config.json is from, if that is not the checkpoint's own folder."""
    path = audience.config_path
    if path is None or path.parent.resolve() == audience.root.resolve():
        return ""
    return f"the configuration is {path}; "
