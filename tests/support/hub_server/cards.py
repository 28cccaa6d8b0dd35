"""Whether the metadata of a model card, YAML between two ``---`` lines, has the Hub's shapes."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

EMPTY = "empty or missing yaml metadata in repo card"


def metadata(card: str) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata and what is wrong with it."""
    lines = card.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}, []
    if "---" not in (ends := [line.strip() for line in lines[1:]]):
        return {}, ["the yaml metadata has no closing ---"]
    try:
        found = yaml.safe_load("\n".join(lines[1 : ends.index("---") + 1]))
    except yaml.YAMLError as error:
        return {}, [f"invalid yaml: {' '.join(str(error).split())}"]
    if found is None:
        return {}, []
    if not isinstance(found, dict):
        return {}, ["the yaml metadata must be a mapping"]
    return found, list(_wrong(found))


def _wrong(data: dict[str, Any]) -> list[str]:
    wrong = []
    for key in ("license", "library_name", "pipeline_tag", "license_name", "license_link"):
        if (
            key in data
            and not isinstance(data[key], str)
            and not (key == "license" and _names(data[key]))
        ):
            wrong.append(f'"{key}" must be a string')
    for key in ("tags", "language", "datasets", "metrics", "base_model"):
        if key in data and not isinstance(data[key], str) and not _names(data[key]):
            wrong.append(f'"{key}" must be a string or an array of strings')
    if "base_model" in data:
        names = [data["base_model"]] if isinstance(data["base_model"], str) else data["base_model"]
        for name in names if _names(names) else []:
            if not 1 <= len(name.split("/")) <= 2 or name.startswith(("/", ".")) or " " in name:
                wrong.append(f'"base_model" must be the id of a repository on the Hub: {name}')
    for at, model in enumerate(_items(data, "model-index", wrong)):
        where = f'"model-index[{at}]'
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            wrong.append(f'{where}.name" is required')
            continue
        for number, result in enumerate(_items(model, "results", wrong, required=True)):
            wrong += _wrong_result(f"{where}.results[{number}]", result)
    return wrong


def _wrong_result(where: str, result: Any) -> list[str]:
    if not isinstance(result, dict):
        return [f'{where}" must be an object']
    wrong = []
    for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key)
        if not isinstance(part, dict):
            wrong.append(f'{where}.{key}" is required')
            continue
        wrong += [
            f'{where}.{key}.{n}" is required' for n in needed if not isinstance(part.get(n), str)
        ]
    for number, metric in enumerate(_items(result, "metrics", wrong, required=True)):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            wrong.append(f'{where}.metrics[{number}].type" is required')
        elif metric.get("value") is None:
            wrong.append(f'{where}.metrics[{number}].value" is required')
    return wrong


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _items(data: dict[str, Any], key: str, wrong: list[str], required: bool = False) -> list[Any]:
    if key not in data and not required:
        return []
    if not isinstance(data.get(key), list):
        wrong.append(f'"{key}" must be an array')
        return []
    items: list[Any] = data[key]
    return items


async def validate(request: Request) -> Response:
    data, wrong = metadata((await request.json())["content"])
    warnings = [] if data or wrong else [{"message": EMPTY}]
    errors = [{"message": message} for message in wrong]
    return JSONResponse({"errors": errors, "warnings": warnings}, 400 if errors else 200)
