"""YAML files as typed objects; a `RequestError` names the file and the key."""

import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from clseg import paths
from clseg.errors import RequestError, nearest, reading
from clseg.settings import AnyStrict, DatasetConfig, Name
from clseg.study.schema import MethodConfig, ProfileConfig, SettingConfig, StudyConfig


class _PlainLoader(yaml.SafeLoader):
    """`yaml.safe_load` that also refuses a key given twice, and aliases that hold themselves or explode."""

    MOST_NODES = 1_000_000

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        alias = self.check_event(yaml.AliasEvent)
        node, parts = super().compose_node(parent, index), []
        if alias and hasattr(node, "nodes"):  # what it stands for is complete
            return node
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            keys: set[tuple[str, str]] = set()
            for key in (key for key in parts[::2] if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"key {key.value!r} is there twice, again in line {key.start_mark.line + 1}")
                keys.add((key.tag, key.value))
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        node.nodes = 1 + sum(getattr(part, "nodes", self.MOST_NODES) for part in parts)
        if alias or node.nodes > self.MOST_NODES:
            raise yaml.YAMLError("its aliases stand for too much; write out what is meant")
        return node


def plain(text: str) -> Any:
    """What YAML says, in plain Python types."""
    return _PlainLoader(text).get_single_data()


def validated(schema: Any, data: Any, where: str) -> Any:
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first, here, keys = error.errors()[0], data, []
        for part in first["loc"]:
            if isinstance(here, Mapping) and part not in here and part in here.values():
                continue  # the tag that pydantic puts in for a union
            keys.append(str(part))
            with suppress(LookupError, TypeError):
                here = here[part]
        key = f"{'.'.join(keys)}: " if keys else ""
        given = "" if isinstance(first["input"], Mapping) else f" (given: {reprlib.repr(first['input'])})"
        if first["type"] == "float_type" and re.fullmatch(r"-?\d+(\.\d*)?[eE][+-]?\d+", str(first["input"])):
            given += f"; in YAML write {float(first['input'])!r}"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise RequestError(f"{where}: {key}{first['msg'].removeprefix('Value error, ')}{given}{more}") from None


@lru_cache(maxsize=256)
def _read(schema: Any, path: Path, _modified_ns: int) -> Any:
    with reading(path, "YAML", "correct it"):
        data = plain(path.read_text(encoding="utf-8"))
    return validated(schema, data, str(path))


def read_as(schema: Any, path: Path) -> Any:
    """A YAML file as a typed parameter, read again only when it changed; a `RequestError` names what is wrong."""
    return _read(schema, path, path.stat().st_mtime_ns if path.is_file() else 0)


def known_names(kind: str) -> list[str]:
    """The names known under `params/<kind>`; a template begins with an underscore and has none."""
    return sorted(file.stem for file in (paths.PARAMS / kind).glob("*.yaml") if not file.stem.startswith("_"))


def _named(schema: type[AnyStrict], kind: str, name: str) -> AnyStrict:
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else paths.PARAMS / kind / f"{name}.yaml"
    if not path.is_file():
        what = schema.__name__.removesuffix("Config").lower()
        if is_path:
            raise RequestError(f"{what} {name}: there is no such file; correct the path")
        raise RequestError(f"{what} {name!r} is not known, {nearest(name, known_names(kind))}")
    found = read_as(schema, path)
    if is_path and found.name in known_names(kind):
        twin = paths.PARAMS / kind / f"{found.name}.yaml"
        if read_as(schema, twin) != found:
            wrong = f"name {found.name!r} is taken in params/{kind} by another one"
            raise RequestError(f"{path}: {wrong}, and results would mix; choose another name")
    return found


read_dataset = partial(_named, DatasetConfig, "datasets")  # each by a name, or by the path of a YAML file
read_profile = partial(_named, ProfileConfig, "profiles")
read_study = partial(_named, StudyConfig, "studies")
read_setting = partial(_named, SettingConfig, "settings")


def read_methods() -> dict[str, MethodConfig]:
    """All methods of `params/methods.yaml`, by name, which is part of the names of folders."""
    return read_as(dict[Name, MethodConfig], paths.PARAMS / "methods.yaml")
