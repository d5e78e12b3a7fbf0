"""The rows of `hf-disparse compare`: every method's own, and those with a number in their name."""

import re
from typing import Any

from hf_disparse.config import METHOD_CONFIGS, PruningConfig

# name -> the method's config class, and settings beside the recipe's
ROWS: dict[str, tuple[type[PruningConfig], dict[str, Any]]] = {
    name: (config, settings) for config in METHOD_CONFIGS for name, settings in config.rows.items()
}
NAMES = ("dense", *ROWS)  # in the order of tables


def find_row(name: str) -> tuple[type[PruningConfig], dict[str, Any]] | None:
    """Returns the config class and the settings of a row, also of `quorum3`, `1:4` or `block8x8`; None for unknown names."""
    if re.fullmatch(r"quorum[1-9]\d*", name):
        number = int(name.removeprefix("quorum"))
        return PruningConfig, {"decision": "quorum" if number > 1 else "unanimous", "quorum": number}
    if re.fullmatch(r"\d+:\d+", name):
        return PruningConfig, {"granularity": name, "schedule": "one_shot"}  # a pattern N:M has no steps
    if re.fullmatch(r"block\d+x\d+", name):
        return PruningConfig, {"granularity": name}
    return ROWS.get(name)


def has_open_criterion(name: str) -> bool:
    """Whether the row of this name leaves its criterion open."""
    row = find_row(name)
    return row is not None and row[0].open_criterion and "criterion" not in row[1]


def help_text() -> str:
    """Returns all names as one line of help."""
    shown = {"quorum2": "quorum2 (or another number)", "parts": "2:4, block16x16, parts"}
    return ", ".join(shown.get(name, name) for name in NAMES)
