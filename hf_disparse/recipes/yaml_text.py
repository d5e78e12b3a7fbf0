"""YAML as people write it. Layer 10."""

import re
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """What a recipe or a value of `--set` says.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it does not parse.
    """
    return yaml.load(text, Loader=_Loader)


def dump_yaml(values: Any) -> str:
    """As text that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def differing_settings(theirs: dict, mine: dict) -> list[str]:
    """The settings in which two recipes differ, each by its dotted name, as `--set` takes it."""
    names = _differing_names(theirs, mine)
    if not names and list(theirs["tasks"]) != list(mine["tasks"]):  # by which heads are initialised and batches drawn
        return ["order of tasks"]
    return names


def _differing_names(theirs: dict, mine: dict) -> list[str]:
    names = []
    for key in sorted({*theirs, *mine}, key=str):
        one, other = theirs.get(key), mine.get(key)
        if one != other:
            within = _differing_names(one, other) if isinstance(one, dict) and isinstance(other, dict) else []
            # Nothing within: a setting of one is null and of the other absent, so takes its default.
            names += [f"{key}.{name}" for name in within] or [str(key)]
    return names


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-5 is a number (in YAML 1.1, which PyYAML reads, it is a string); a key stands once."""


# Before PyYAML's own, for which 2:4 is a number to base 60.
_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"^\d+:\d+$")), *known] if first in set("123456789") else known
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that our loader would take for a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, whose keys the mapping's own ones replace
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
