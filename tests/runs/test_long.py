"""Two thousand steps with 199 updates: memory stays what it was, and no handle is lost."""

import pytest

from tests.helpers.processes import child, messages, train_long


@pytest.mark.slow
def test_memory_stays_flat_and_handles_are_given_back(tmp_path):
    """From step 400 to 2,000, in a process of its own: below 2 % more memory, and not one file, thread or batch of tensors more."""
    with child(train_long, str(tmp_path)) as (_, connection):
        *rows, end = messages(connection)
    assert end == (2000, 199), "steps and updates, from the tenth to the 1,990th"
    warm, last = rows[0], rows[-1]
    assert [row["step"] for row in rows] == [400, 800, 1200, 1600, 2000]
    assert last["memory"] < 1.02 * warm["memory"], rows
    assert (last["files"], last["threads"]) == (warm["files"], warm["threads"]), rows
    assert last["tensors"] <= warm["tensors"] + 10, "a few more or less by where the epoch is"
