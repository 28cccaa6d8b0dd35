"""The verdict on a product: from headers, without torch or transformers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.weights import advice, parts
from ckpt.weights.check import second_opinion, verdicts
from ckpt.weights.reader import modular, table
from ckpt.weights.reader.audience import Audience, Match
from ckpt.weights.reader.fields import Disagreement
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.table import Reader
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.formats import gathered_16bit
from converters.options import CHECK, CONFIG, EXCLUDE_FROZEN, NAMES, SELECT, STRIP
from converters.tensors import Weights
from converters.words import counted, some

if TYPE_CHECKING:
    from ckpt.weights.output.product import Product


def check(product: Product, root: Path, request: Request) -> LoadVerdict:
    """The verdict on a product. ``CheckpointError`` (unloadable) if it cannot load."""
    return modular.judged(_of_weights(product, root, request), product.lacking, root)


def _of_weights(product: Product, root: Path, request: Request) -> LoadVerdict:
    """The verdict on the weights of a product."""
    if product.kind == "adapter":
        from ckpt.weights.check import adapter_reader

        return adapter_reader.check(product, root, request)

    if request.naming.as_stored:
        return LoadVerdict(
            f"not checked: the names are those of the checkpoint ({NAMES('as-stored')})"
        )
    if request.check == "none":
        return LoadVerdict(f"not checked ({CHECK('none')})")

    surroundings = product.surroundings

    # The names of a file prove nothing of the file's own weights.
    alone = gathered_16bit.holds(root, product.weights)

    return judged(
        product, Audience(root, surroundings.config, alone, surroundings.config_path), request
    )


def judged(product: Product, audience: Audience, request: Request) -> LoadVerdict:
    """The verdict on a model's weights, by its known reader or by transformers.

    ``CheckpointError`` (kind "unloadable") if it would not load.
    """
    if request.check == "auto" and audience.config is not None:
        return second_opinion.judged(
            lambda check: judged(product, audience, replace(request, check=check)), audience
        )

    if request.check == "transformers" and audience.config is not None:
        return _with_shapes(_by_transformers(product, audience, request), product.weights, audience)

    verdict = _by_names(product, audience, request)
    reader = table.reader_of(verdict.reader) if verdict.reader else None
    size = None
    if reader is not None and audience.config is not None:
        size = reader.fields.mismatched_size(product.weights, audience.config)
    if reader is not None and size is not None:
        from ckpt.weights.check import refusals

        raise refusals.other_shapes(reader.name, size, audience)

    return _with_shapes(verdict, product.weights, audience)


def _by_transformers(product: Product, audience: Audience, request: Request) -> LoadVerdict:
    """The verdict by the model that the installed transformers builds."""
    if audience.custom and not audience.native:
        return LoadVerdict("not checked: custom code (auto_map) is not run")

    from ckpt.weights.reader import installed, losses

    assert audience.config is not None
    names = parts.read_names(product.weights)
    match = audience.best(names, bridged=True) if audience.architecture is None else None
    answer = installed.ask(audience.config, match.reader.name if match is not None else None)
    form, fit = installed.best(answer, names)
    reader = str(answer["class"])
    missing = _missing_names(product, reader, fit, audience, request)
    loss = losses.loss(product.weights, fit, ())
    mismatched = installed.mismatched(answer, form, product.weights)
    if mismatched:
        raise CheckpointError(
            f"{audience.root}: {reader} of {form.name} has other shapes of "
            f"{some(mismatched)}; correct config.json ({CONFIG})",
            "unloadable",
        )

    from ckpt.weights.check import heads

    table_reader = table.reader_of(reader)
    other_match = (
        heads.class_without(product, table_reader, fit, missing, audience, request)
        if table_reader
        else None
    )
    if table_reader is not None and other_match is not None:
        config = {**audience.config, "architectures": [other_match.reader.name]}
        verdict = _by_transformers(product, replace(audience, config=config), request)
        note = verdicts.other_note(other_match, Match(table_reader, fit), missing)
        return replace(verdict, notes=(note, *verdict.notes))

    verdict = verdicts.partial(reader, fit, missing, loss, audience, "")
    if fit.missing and not missing:  # a part of the model was asked for
        return verdict
    return replace(verdict, line=verdicts.asked_line(reader, form.name, fit, missing))


def require_elements(weights: Weights, what: str) -> None:
    """Raises if a parameter has no elements, as ZeRO-3 leaves them in a module."""
    empty = [name for name, ref in weights.tensors.items() if not ref.numel]
    if empty:
        raise CheckpointError(
            f"{counted(len(empty), 'tensor')} of {what} have no elements, the first "
            f"{empty[0]}: the training holds them in parts (ZeRO-3), so that nobody "
            "can load them",
            "unloadable",
        )


def _with_shapes(verdict: LoadVerdict, weights: Weights, audience: Audience) -> LoadVerdict:
    """The same with what shapes tell: resized embeddings, ties, 16-bit weights."""
    notes, loads, line = list(verdict.notes), verdict.loads, verdict.line
    failure = verdict.failure
    reader = table.reader_of(verdict.reader) if verdict.reader else None
    if reader is not None and audience.config is not None:
        from ckpt.weights.reader import embeddings, untying

        rows = embeddings.resized(weights, reader, audience.config)
        if rows is not None:
            notes.append(str(rows))
            loads, failure = False, str(rows)
            line = line.removeprefix("loads as ")
            line += f", but from_pretrained fails until config.json has {rows.need}"

        if (tie_note := untying.note(weights, reader, audience.config)) is not None:
            notes.append(tie_note)
    elif audience.beside is not None:
        mismatched = audience.beside.mismatched(weights)
        if mismatched:
            notes.append(
                f"{counted(len(mismatched), 'tensor')} of another shape than in "
                f"{audience.beside.name}: {some(mismatched)}"
            )

    return replace(verdict, line=line, loads=loads, notes=tuple(notes), failure=failure)


def _by_names(product: Product, audience: Audience, request: Request) -> LoadVerdict:
    names = parts.read_names(product.weights)
    if product.weights.packed and audience.config is not None and audience.quantized is None:
        return LoadVerdict("not checked: config.json does not say that weights are quantized")

    match = audience.best(names, bridged=True)
    if match is None:
        from ckpt.weights.reader import unknown

        return unknown.verdict(names, audience)

    reader, fit = match.reader, match.fit
    if fit.absurd:
        from ckpt.weights.check import refusals

        raise refusals.absurd(reader.name, fit.absurd, audience)

    disagreements = _by_fields(reader, fit, audience)
    missing = _missing_names(product, reader.name, fit, audience, request)
    if not missing and not fit.unexpected:
        _require_wanted_elements(product.weights, reader.name)
        return verdicts.loads(match, names, audience)
    if product.kind == "merged" and missing and table.LABELS in reader.rows:
        # No other class is looked for: one without this head would fit, and lose it.
        from ckpt.weights.check import refusals

        raise refusals.unmerged(reader.name, fit, missing, audience)

    other_match = audience.other_class(names)
    if other_match is not None and not _by_fields(other_match.reader, other_match.fit, audience):
        return verdicts.loads_as_other(other_match, match, names, missing, audience)
    return _by_losses(match, names, missing, disagreements, product, audience, request)


def _by_losses(
    match: Match,
    names: list[str],
    missing: list[str],
    disagreements: Collection[Disagreement],
    product: Product,
    audience: Audience,
    request: Request,
) -> LoadVerdict:
    """The verdict on names that do not fit, by what would be unread or random."""
    from ckpt.weights.reader import losses

    reader, fit = match.reader, match.fit
    loss = losses.loss(product.weights, fit, disagreements)
    beside = audience.beside
    other_names = loss.substantial or match.foreign or disagreements
    if beside is not None and not other_names and beside.fit(names).exact:
        line = f"has the names of {beside.name}: {counted(len(names), 'name')}"
        return LoadVerdict(line, reader=reader.name)
    if missing and product.kind == "merged" and not audience.newer:
        from ckpt.weights.check import refusals

        raise refusals.unmerged(reader.name, fit, missing, audience)

    from ckpt.weights.check import heads

    other_match = heads.class_without(product, reader, fit, missing, audience, request)
    if other_match is not None:
        return verdicts.loads_as_other(other_match, match, names, missing, audience)
    return verdicts.partial(reader.name, fit, missing, loss, audience, advice.ask_transformers())


def _by_fields(reader: Reader, fit: Fit, audience: Audience) -> tuple[Disagreement, ...]:
    """The fields of config.json that switch names on or off; updates ``fit``."""
    if not fit.present or audience.config is None:
        return ()

    unknown_names, config = set(fit.unexpected), audience.config
    read_names = {name: before for name, before in fit.read.items() if before not in unknown_names}
    disagreements = reader.fields.disagreements(read_names, config, reader.names_like(fit, config))
    disagreements = tuple(_but_for_passed(each, reader) for each in disagreements)
    disagreements = tuple(each for each in disagreements if each.missing or each.unexpected)
    unread = dict.fromkeys(read_names[name] for each in disagreements for name in each.unexpected)
    fit.present -= len(unread)
    fit.unexpected += unread
    fit.missing += dict.fromkeys(name for each in disagreements for name in each.missing)

    return disagreements


def _but_for_passed(each: Disagreement, reader: Reader) -> Disagreement:
    return each._replace(unexpected=tuple(n for n in each.unexpected if not reader.passes_over(n)))


def _missing_names(
    product: Product, reader: str, fit: Fit, audience: Audience, request: Request
) -> list[str]:
    """The missing names; none for a selection of which some is read."""
    option = SELECT if request.naming.select else EXCLUDE_FROZEN
    if not request.naming.select and not request.exclude_frozen:
        return fit.missing
    if not fit.present:
        from ckpt.weights.check import refusals

        names = parts.every_name(product.weights)
        raise CheckpointError(
            f"{audience.root}: {reader}, {audience.origin}, reads none of the "
            f"{counted(len(names), 'name')} that {option} leaves: {some(names)}; "
            f"{refusals.source(audience)}drop the prefix of its names with {STRIP}, or "
            f"{advice.write_as_stored()}",
            "unloadable",
        )

    return []


def _require_wanted_elements(weights: Weights, reader: str) -> None:
    parameters = {n: r for n, r in weights.tensors.items() if n not in weights.buffers}
    if any(not ref.numel for ref in parameters.values()):
        require_elements(Weights(parameters), reader)
