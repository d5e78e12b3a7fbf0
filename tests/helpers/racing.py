"""The race that tests run: its recipe, its command and its cells."""

from pathlib import Path

from tests.helpers.cli_helpers import changed
from tests.helpers.comparing import write_comparison

COMMAND = ("--protocol", "equal-budget", "--sparsities", "0.6,0.8,0.9", "--budgets", "0.3,0.5", "--seeds", "1,2")
SINGLES = [(task, s) for task in ("two", "real") for s in (0.6, 0.8, 0.9)]
CELLS = [(*who, seed) for seed in (1, 2) for who in (*SINGLES, (None, 0.7), (None, 0.5))]


def write_race(folder: Path) -> dict:
    """The tasks of a comparison; pruning asks for a quorum of 2 and goes in two steps."""
    pruning = {"sparsity": 0.9, "decision": "quorum", "quorum": 2, "score_batches": 2}
    pruning |= {"schedule": "cubic", "start_step": 0, "update_every": 1, "end_step": 2}
    return changed(write_comparison(folder), "pruning", pruning)
