"""GLUE's tasks as recipes name them, against the data's own features."""

from pathlib import Path

import pytest
from datasets import ClassLabel

from hf_disparse import UserError, load_task
from hf_disparse.recipes.recipe import parse_recipe, read_recipe
from hf_disparse.tasks.glue import GLUE
from tests.helpers.glue import GLUE as FOLDER
from tests.helpers.glue import needs_glue

HERE = [name for name in GLUE if (FOLDER / name).is_dir()]


def recipe(tasks: dict) -> dict:
    return {"model": {"encoder": "x"}, "tasks": tasks, "output_dir": "y"}


@needs_glue
@pytest.mark.parametrize("name", HERE)
def test_columns_labels_and_splits_are_those_of_the_data(name):
    task, data = parse_recipe(recipe({name: {"glue": name, "data": str(FOLDER)}})).tasks[name]
    for rows in load_task(task, data):
        assert set(rows.column_names) == {*task.columns, task.label_column, "idx"}
        feature = rows.features[task.label_column]
        if isinstance(feature, ClassLabel):
            assert tuple(feature.names) == task.labels
        else:
            assert task.problem_type == "regression"


def test_one_override_points_every_task_elsewhere(tmp_path):
    path = Path(tmp_path, "recipe.yaml")
    path.write_text(
        "model: {encoder: x}\noutput_dir: y\ntasks:\n  rte: {glue: rte}\n  second: {glue: mnli, weight: 2}\n"
    )
    plain, moved = read_recipe(path), read_recipe(path, ["tasks.*.data=elsewhere"])
    assert [data.data for _, data in plain.tasks.values()] == ["nyu-mll/glue"] * 2
    assert [data.data for _, data in moved.tasks.values()] == ["elsewhere"] * 2
    task, data = moved.tasks["second"]
    assert (task.name, task.weight, data.subset, data.validation_split) == ("second", 2, "mnli", "validation_matched")


@pytest.mark.parametrize("name", ["rtee", 3, ["rte"], None])
def test_another_name_is_refused_with_the_closest(name):
    with pytest.raises(UserError, match=r"tasks\.a\.glue: there is no GLUE task"):
        parse_recipe(recipe({"a": {"glue": name}}))
