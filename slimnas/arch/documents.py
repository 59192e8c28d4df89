"""YAML and JSON in, YAML out, for every slimnas document, and one clear line per fault.

A document is a mapping whose first key is `schema: slimnas/<kind>/<version>`. Files are read
with a safe loader that also refuses duplicate keys, and validated by a pydantic model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from slimnas._files import atomic_write_text, read_text
from slimnas.errors import SpecError, suggest


class Spec(BaseModel):
    """Base of every part of a document: frozen, unknown keys refused with the closest name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            unknown = [str(key) for key in data if key not in known]
            if unknown:
                named = ", ".join(f"{key!r}{suggest(key, known)}" for key in unknown)
                raise ValueError(f"unknown key {named}; known keys: {', '.join(known)}")
        return data


SpecT = TypeVar("SpecT", bound=BaseModel)

_LEAKS = (ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML's safe loader lets through: impossible dates, huge numbers, deep nesting."""

_MUST = {
    "missing": "missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} item(s), has {actual_length}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be one of {expected_tags}, got {tag!r}",
    "union_tag_not_found": "missing",
}
"""Wording of the faults pydantic finds, by its name for them; the rest keep pydantic's own."""


def load_document(path: Path, schema: str, what: str) -> dict[str, Any]:
    """Read a YAML document and check its schema line.

    Args:
        path: the YAML file.
        schema: the schema this version reads, such as `slimnas/architecture/1`.
        what: what the file should be, for messages.

    Returns:
        The mapping without its `schema` key.

    Raises:
        SpecError: missing file, broken YAML, or another schema or version.
    """
    text = read_text(path, SpecError, what)
    return parse_document(text, schema, what, source=str(path))


def load_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a document in JSON; its schema is for `check_schema` to check.

    Raises:
        SpecError: missing file, broken JSON, or no mapping.
    """
    text = read_text(Path(path), SpecError, what)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid JSON ({error}); expected {what}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: must be a mapping that describes {what}, got {_kind(data)}")
    return data


def schema_of(path: Path, what: str) -> object:
    """The schema that a document in YAML or JSON says it has; None where it says nothing.

    Raises:
        SpecError: missing file or broken YAML.
    """
    data = _yaml(read_text(path, SpecError, what), str(path))
    return data.get("schema") if isinstance(data, dict) else None


def parse_document(text: str, schema: str, what: str, *, source: str) -> dict[str, Any]:
    """Like `load_document`, for text already read; `source` names it in messages."""
    data = _yaml(text, source)
    if not isinstance(data, dict):
        raise SpecError(f"{source}: must be a mapping that describes {what}, got {_kind(data)}")
    return check_schema(data, schema, what, source=source)


def check_schema(data: Mapping[str, Any], schema: str, what: str, *, source: str) -> dict[str, Any]:
    """Check `data["schema"]` and return `data` without it.

    Raises:
        SpecError: no schema, another kind of document, or another version.
    """
    given = data.get("schema")
    if given is None:
        raise SpecError(f"{source}: schema: missing; {what} begins with 'schema: {schema}'")
    if given != schema:
        kind, _, version = schema.rpartition("/")
        given_kind, _, given_version = str(given).rpartition("/")
        if given_kind == kind:
            raise SpecError(
                f"{source}: schema: this slimnas reads version {version} of {kind}, "
                f"the file has version {given_version}; use the slimnas that wrote it"
            )
        raise SpecError(f"{source}: schema: must be {schema!r} for {what}, got {given!r}")
    return {key: value for key, value in data.items() if key != "schema"}


def parse_spec(model: type[SpecT], data: Mapping[str, Any], *, source: str) -> SpecT:
    """Validate `data` as `model`.

    Raises:
        SpecError: one line per fault, each `source: key.path: what must hold, what was given`.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError("\n".join(_fault_lines(error, data, source))) from error


def dump_yaml(schema: str, body: Mapping[str, Any]) -> str:
    """Return the YAML text of a document; the same body always gives the same text."""
    return yaml.safe_dump(
        {"schema": schema, **body}, sort_keys=False, default_flow_style=None, width=100
    )


def save_document(path: Path, schema: str, body: Mapping[str, Any]) -> None:
    """Write a document atomically.

    Raises:
        RunFolderError: the place cannot be written.
    """
    atomic_write_text(path, dump_yaml(schema, body))


def _fault_lines(error: ValidationError, data: object, source: str) -> list[str]:
    lines = []
    faults = error.errors()
    for fault in faults:
        if any(
            other["loc"][: len(fault["loc"])] == fault["loc"] != other["loc"] for other in faults
        ):
            continue  # a consequence of the deeper fault
        where = _key_path(fault, data)
        message = _message(fault)
        lines.append(f"{source}: {where}: {message}" if where else f"{source}: {message}")
    return lines


def _message(fault: ErrorDetails) -> str:
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    message = _MUST.get(kind, fault["msg"]).format(**context)
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']*)'", context["expected_tags"])
        return message + suggest(context["tag"], known)
    if kind == "literal_error" and isinstance(given, str):
        known = re.findall(r"'([^']*)'", context["expected"])
        return f"{message}, got {given!r}{suggest(given, known)}"
    says_given = kind in ("missing", "too_short", "union_tag_not_found")
    if not says_given and isinstance(given, (str, int, float, bool, type(None))):
        message += f", got {given!r}"
    return message


def _key_path(fault: ErrorDetails, data: object) -> str:
    """Where the fault is in the document: pydantic's place without its names for alternatives."""
    path, at, last = "", data, len(fault["loc"]) - 1
    for depth, part in enumerate(fault["loc"]):
        is_missing = fault["type"] == "missing" and depth == last
        if isinstance(part, int):
            path += f"[{part}]"
            at = at[part] if isinstance(at, Sequence) and part < len(at) else None
        elif is_missing or (isinstance(at, Mapping) and part in at):
            path += f".{part}" if path else part
            at = at.get(part) if isinstance(at, Mapping) else None
    if fault["type"].startswith("union_tag"):
        path += ".type"
    return path


def _yaml(text: str, source: str) -> object:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, *_LEAKS) as error:
        raise SpecError(f"{source}: not valid YAML: {_one_line(error)}") from error


def _kind(data: object) -> str:
    return "an empty file" if data is None else f"a {type(data).__name__}"


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
