"""YAML as people write it."""

import re
import types
from typing import Any

import yaml

KINDS = {  # how messages name the types of YAML values
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def parse_yaml(text: str) -> Any:
    """Returns the values in the text of a recipe or of an override.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text does not parse.
    """
    return yaml.load(text, Loader=_Loader)


def dump_yaml(values: Any) -> str:
    """Returns text that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def differing_settings(theirs: dict, mine: dict) -> list[str]:
    """Returns the dotted names (`pruning.sparsity`) of the settings in which two recipes differ."""
    names = _differing_names(theirs, mine)
    if not names and list(theirs["tasks"]) != list(
        mine["tasks"]
    ):  # it decides how heads are initialised and batches drawn
        return ["order of tasks"]
    return names


def _differing_names(theirs: dict, mine: dict) -> list[str]:
    names = []
    for key in sorted({*theirs, *mine}, key=str):
        one, other = theirs.get(key), mine.get(key)
        if one != other:
            within = _differing_names(one, other) if isinstance(one, dict) and isinstance(other, dict) else []
            # Empty if one has null and the other no such key, which takes its default.
            names += [f"{key}.{name}" for name in within] or [str(key)]
    return names


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number (PyYAML follows YAML 1.1, where it is a string) and refuses a key that stands twice."""


# Before PyYAML's own resolvers, which read 2:4 as a number to base 60.
_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"^\d+:\d+$")), *known] if first in set("123456789") else known
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes text that our loader would read as a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, whose keys give way to the mapping's own
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
