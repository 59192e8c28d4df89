"""YAML in and out for every slimnas document, and one clear line per fault.

A document is a mapping whose first key is `schema: slimnas/<kind>/<version>`. Files are read
with a safe loader that also refuses duplicate keys, and validated by a pydantic model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

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


def parse_document(text: str, schema: str, what: str, *, source: str) -> dict[str, Any]:
    """Like `load_document`, for text already read; `source` names it in messages."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {_one_line(error)}") from error
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
        raise SpecError("\n".join(_fault_lines(error, source))) from error


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


def _fault_lines(error: ValidationError, source: str) -> list[str]:
    lines = []
    faults = error.errors()
    for fault in faults:
        if any(
            other["loc"][: len(fault["loc"])] == fault["loc"] != other["loc"] for other in faults
        ):
            continue  # a consequence of the deeper fault
        where = _key_path(fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        shows_input = fault["type"] not in ("value_error", "missing")
        if shows_input and isinstance(given, (str, int, float, bool, type(None))):
            message += f", got {given!r}"
        lines.append(f"{source}: {where}: {message}" if where else f"{source}: {message}")
    return lines


def _key_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    return path


def _kind(data: object) -> str:
    return "an empty file" if data is None else f"a {type(data).__name__}"


def _one_line(error: yaml.YAMLError) -> str:
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
