"""Reads the YAML of a config file strictly: UTF-8 text without duplicate keys.

PyYAML silently keeps the last of two equal keys, expands aliases without limit, and picks the encoding by the byte
order mark alone.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from itertools import islice
from pathlib import Path

import yaml

from deployments.checkpoints.sources import ROOT
from serve.config.base import SettingsError
from serve.failures import one_line, printable

MOST_BYTES = 512 * 2**10
MOST_VALUES = 100_000
"""Most values, counting each repetition by an alias."""
DEEPEST = 50
LISTED = 1000
"""Most files of a folder that are searched for a similar name."""
SURPRISING = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")
"""Octal numbers, such as 010, and those to the base 60, such as 1:30."""
MERGE = "tag:yaml.org,2002:merge"
CONTAINERS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def read_yaml(path: Path) -> object:
    """The document in a file: mappings, lists, text, finite or infinite numbers, booleans and None.

    Raises SettingsError in one line that names the file and, if known, the line at fault.
    """
    text = _text(path)
    try:
        loader = _Loader(path, text)
        root = loader.get_single_node()
        if root is None:
            return None
        loader.check(root)
        document: object = loader.construct_document(root)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise SettingsError(f"{path}{where}: this is not YAML: {one_line(said)}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: this is not YAML: {one_line(str(error))}") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: this is nested more than {DEEPEST} deep") from error


def _text(path: Path) -> str:
    """The file's text, without a byte order mark."""
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise SettingsError(f"{path} is a folder; name a file")
        if not stat.S_ISREG(kind):
            raise SettingsError(f"{path} is not a file on a disk")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: {error.strerror}{_nearest(path)}") from error
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise SettingsError(f"{path}: a config file may have at most {MOST_BYTES // 2**10} KiB")
    end = content.find(b"\0")  # UTF-16 has null bytes in plain letters
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        end = error.start
    if end >= 0:
        raise SettingsError(f"{path}, line {content.count(10, 0, end) + 1}: this is not UTF-8; save it as UTF-8")
    return text


def _nearest(path: Path) -> str:
    """A hint naming a similar file in the same folder or among the shipped configs. Empty if there is none."""
    files: dict[str, Path] = {}
    for folder in (ROOT / "configs", path.parent):
        try:
            with os.scandir(folder) as entries:
                names = [Path(entry.name) for entry in islice(entries, LISTED)]
        except OSError:
            continue
        files |= {name.stem: folder / name for name in names if name.suffix in (".yaml", ".yml")}
    near = difflib.get_close_matches(path.stem, files, n=1)
    return f"; did you mean {files[near[0]]}?" if near else ""


class _Loader(yaml.SafeLoader):
    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path = path
        self.values = 0

    def check(self, node: yaml.Node, *place: str) -> None:
        """Raises SettingsError for duplicate keys and for YAML that no config file needs."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise self._wrong(node, f"aliases make more than {MOST_VALUES:,} values")
        if len(place) > DEEPEST:
            raise self._wrong(node, f"this is nested more than {DEEPEST} deep")
        if isinstance(node, yaml.ScalarNode):
            self._scalar(node, place)
        elif node.tag not in CONTAINERS:
            raise self._wrong(node, f"{'.'.join(place)}: a config file can't contain {node.tag}")
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, place)
        else:
            for number, each in enumerate(node.value):
                self.check(each, *place, str(number))

    def _mapping(self, node: yaml.MappingNode, place: tuple[str, ...]) -> None:
        lines: dict[object, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise self._wrong(name, f"{'.'.join(place)}: a key has to be text")
            key = name.value if name.tag == MERGE else self._scalar(name, place)
            here = (*place, str(key))
            if key in lines:
                first = lines[key]
                raise self._wrong(name, f"{'.'.join(here)} is a duplicate key, first set in line {first}; remove one")
            lines[key] = name.start_mark.line + 1
            self.check(value, *here)

    def _scalar(self, node: yaml.ScalarNode, place: tuple[str, ...]) -> object:
        where = f"{'.'.join(place)}: {node.value[:60]!r}"
        try:
            value: object = self.construct_object(node)
        except (ValueError, LookupError, AttributeError) as error:  # such as a date with a 13th month
            raise self._wrong(node, f"{where} can't be read; if it is text, put it in quotes") from error
        if not isinstance(value, str | int | float | None):
            raise self._wrong(node, f"{where} is read as a {type(value).__name__}; put it in quotes")
        if isinstance(value, int) and abs(value) >= 2**1024:  # larger than any float
            raise self._wrong(node, f"{where} is too large a number; if it is text, put it in quotes")
        if isinstance(value, int | float) and SURPRISING.fullmatch(node.value):
            raise self._wrong(node, f"{where} is read as {value}; write that, or put it in quotes")
        return value

    def _wrong(self, node: yaml.Node, what: str) -> SettingsError:
        return SettingsError(f"{self.path}, line {node.start_mark.line + 1}: {printable(what)}")
