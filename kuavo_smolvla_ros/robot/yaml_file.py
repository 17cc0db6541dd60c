"""Safe YAML with a memory of where each key stands, so that every complaint names file, line and key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.paths import config_dir

MERGE_KEY = "extends"


class SpecError(UserError):
    """A robot description that cannot be used; the message names file, line and key."""


class MarkedMap(dict[str, Any]):
    """A mapping that knows the file and line of each of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, str] = {}


class _MarkedLoader(yaml.SafeLoader):
    pass


def _construct_map(loader: _MarkedLoader, node: yaml.MappingNode) -> MarkedMap:
    result = MarkedMap()
    for key_node, value_node in node.value:
        where = f"{Path(key_node.start_mark.name).name}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise SpecError(f"{where}: the key {key!r} is not text; put it in quotes")
        if key in result:
            raise SpecError(f"{where}: the key '{key}' stands twice in the same place; remove one of them")
        result[key] = loader.construct_object(value_node, deep=True)
        result.marks[key] = where
    return result


_MarkedLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_map)


def read_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> MarkedMap:
    """Read a mapping; `extends: other.yaml` (beside it, or else shipped) lays this file over the other."""
    path = path.resolve()
    if path in _chain:
        loop = " -> ".join(p.name for p in (*_chain, path))
        raise SpecError(f"{path.name}: '{MERGE_KEY}' runs in a circle: {loop}")
    try:
        with path.open(encoding="utf-8") as stream:
            loaded = yaml.load(stream, Loader=_MarkedLoader)  # a SafeLoader
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, MarkedMap):
        raise SpecError(f"{path.name}: holds {type(loaded).__name__}, a mapping of keys is needed")
    if MERGE_KEY not in loaded:
        return loaded
    base = loaded.pop(MERGE_KEY)
    if not isinstance(base, str):
        raise SpecError(f"{loaded.marks[MERGE_KEY]}: '{MERGE_KEY}' takes one file name")
    below, shipped = path.parent / base, config_dir() / "robot" / base
    if not below.is_file() and shipped.is_file():
        below = shipped
    return _overlay(read_yaml(below, (*_chain, path)), loaded)


def _overlay(below: MarkedMap, above: MarkedMap) -> MarkedMap:
    """Mappings merge key by key; everything else (lists too) is replaced; an explicit null removes a key."""
    result = MarkedMap()
    result.update(below)
    result.marks.update(below.marks)
    for key, value in above.items():
        if value is None:
            result.pop(key, None)
            continue
        old = result.get(key)
        if isinstance(old, MarkedMap) and isinstance(value, MarkedMap):
            value = _overlay(old, value)
        result[key] = value
        result.marks[key] = above.marks[key]
    return result


class Section:
    """A mapping being read: each key is taken with its type and bounds; `close` refuses what is left."""

    def __init__(self, data: MarkedMap, path: str, file: str) -> None:
        self._data = data
        self._left = dict.fromkeys(data)
        self.path = path
        self._file = file

    def error(self, key: str | None, text: str) -> SpecError:
        where = self._data.marks.get(key, self._file) if key else self._file
        dotted = ".".join(part for part in (self.path, key or "") if part)
        return SpecError(f"{where}: {dotted}: {text}" if dotted else f"{where}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def take(self, key: str) -> Any:
        if key not in self._data:
            raise self.error(None, f"the key '{key}' is missing")
        self._left.pop(key, None)
        return self._data[key]

    def text(self, key: str, choices: tuple[str, ...] = ()) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"{value!r} is not text")
        if choices and value not in choices:
            raise self.error(key, f"'{value}' is unknown; choose one of {', '.join(choices)}")
        return value

    def number(self, key: str, *, above: float = -math.inf, infinite: bool = False) -> float:
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"{value!r} is not a number")
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise self.error(key, f"{value} is not a finite number")
        if value <= above:
            raise self.error(key, f"{value} must be above {above:g}")
        return float(value)

    def whole(self, key: str, *, above: int = 0) -> int:
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{value!r} is not a whole number")
        if value <= above:
            raise self.error(key, f"{value} must be above {above}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise self.error(key, f"{value!r} is not a list of names")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.take(key)
        good = isinstance(value, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value
        )
        if not good:
            raise self.error(key, f"{value!r} is not a list of finite numbers")
        return tuple(float(v) for v in value)

    def section(self, key: str) -> Section:
        value = self.take(key)
        if not isinstance(value, MarkedMap):
            raise self.error(key, f"{value!r} is not a mapping")
        return Section(value, f"{self.path}.{key}" if self.path else key, self._data.marks[key])

    def sections(self, key: str) -> list[Section]:
        value = self.take(key)
        if not isinstance(value, list) or not all(isinstance(v, MarkedMap) for v in value):
            raise self.error(key, "must be a list of mappings")
        base = f"{self.path}.{key}" if self.path else key
        return [
            Section(v, f"{base}[{i}]", next(iter(v.marks.values()), self._file)) for i, v in enumerate(value)
        ]

    def children(self) -> Iterator[tuple[str, Section]]:
        for key in self._data:
            yield key, self.section(key)

    def close(self) -> None:
        for key in self._left:
            known = ", ".join(k for k in self._data if k not in self._left)
            raise self.error(key, f"unknown key (known here and used: {known or 'none'})")


def open_yaml(path: Path) -> Section:
    return Section(read_yaml(path), "", path.name)


def plain(value: Any) -> Any:
    """The same data without marks, for constants that are handed on as they are."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value
