"""Whose an output folder is: other data, another order of tasks, a second command in it, files that are no results."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from hf_disparse.files import write_whole
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.runs.folder import alone_in, claim
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, write_csv, write_inputs, write_recipe


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with a recipe and its inputs, and a comparison that has its dense row; tests do not change it for good."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = {**write_inputs(folder), "output_dir": str(folder / "run")}
    status, _, err = hf_disparse("compare", write_recipe(folder, recipe), "--methods", "dense", "--seeds", "1")
    assert status == 0, err
    return folder


def _recipe(folder: Path) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_other_data_are_refused_whatever_they_are_begun_for(begun):
    path, data = begun / "recipe.yaml", begun / "two.csv"
    old, before = data.read_bytes(), snapshot(begun / "run-compare")
    said = ("tasks.two: the train examples differ from those that", "run-compare started with")
    more = ("compare", path, "--methods", "dense,magnitude", "--seeds", "1")
    taken = ("train", path, "--set", "seed=1", "--set", f"dense_from={begun / 'run-compare'}")
    try:
        write_csv(data, ["no", "yes"], rows=33, seed=0)
        for command in (more, taken, (*taken, "--dry-run")):
            refused(*command, names=said)
        write_csv(data, ["yes", "no"], rows=32, seed=0)  # the same texts, other labels
        refused(*more, names=said)
    finally:
        data.write_bytes(old)
    assert snapshot(begun / "run-compare") == before and not (begun / "run").exists()
    assert hf_disparse(*more)[0] == 0
    assert json.loads((begun / "run-compare" / "data.json").read_text()).keys() == {"1"}


def test_the_settings_that_make_it_another_run_are_named_as_set_takes_them(begun):
    words = ("compare", begun / "recipe.yaml", "--methods", "dense", "--seeds", "1", "--set", "tasks.two.weight=2")
    refused(*words, "--set", "seed=4", names=("holds another run, which differs in seed, tasks.two.weight.\n",))


def test_tasks_in_another_order_are_another_run(begun):
    turned = _recipe(begun)
    turned["tasks"] = dict(reversed(turned["tasks"].items()))
    words = ("compare", write_recipe(begun, turned, "turned.yaml"), "--methods", "dense", "--seeds", "1")
    refused(*words, names=("output_dir", "differs in order of tasks"))


@pytest.mark.parametrize("words", [("train",), ("compare", "--methods", "dense", "--seeds", "1")])
def test_a_folder_that_another_command_claimed_meanwhile_is_refused(begun, tmp_path, monkeypatch, words):
    command, *options = words
    path, other = begun / "recipe.yaml", parse_recipe(_recipe(begun) | {"seed": 2})
    for module in ("runs.train", "compare.runner"):
        monkeypatch.setattr(f"hf_disparse.{module}.claim", lambda folder, recipe: claim(folder, other))
    refused(
        command,
        path,
        *options,
        "--output_dir",
        tmp_path / "run",
        names=("holds another run", "differs in seed", "its own --output_dir"),
    )
    assert not list((tmp_path / "run").rglob("*.json"))


def test_what_another_command_finished_meanwhile_is_not_run_again(begun, tmp_path, monkeypatch):
    folder = shutil.copytree(begun / "run-compare", tmp_path / "run")
    words, done = ("compare", begun / "recipe.yaml", "--methods", "max", "--seeds", "1", "--output_dir", folder), []

    def after_another(folder):
        if not done:
            done.append(folder)  # once: the other command comes by here, too
            assert hf_disparse(*words)[0] == 0
            done.append(snapshot(folder / "cells"))
        return alone_in(folder)

    monkeypatch.setattr("hf_disparse.compare.runner.alone_in", after_another)
    assert hf_disparse(*words)[0] == 0
    assert done[0] == folder and snapshot(folder / "cells") == done[1]


def test_a_second_command_waits_outside(begun, monkeypatch):
    monkeypatch.setattr("hf_disparse.runs.folder.PATIENCE", 0)
    folder, words = begun / "run-compare", ("--methods", "random", "--seeds", "1")
    with alone_in(folder):
        refused(
            "compare", begun / "recipe.yaml", *words, names=("output_dir", "is in use by another hf-disparse command")
        )
    assert hf_disparse("compare", begun / "recipe.yaml", *words)[0] == 0


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"cell": {}}', "{"])
def test_a_file_that_is_no_cell_is_refused_before_anything_runs(begun, text):
    path = begun / "run-compare" / "cells" / "other.json"
    path.write_text(text)
    try:
        refused(
            "compare", begun / "recipe.yaml", "--methods", "sum", "--seeds", "1", names=(str(path), "Delete that file")
        )
    finally:
        path.unlink()
    assert not list(path.parent.glob("sum*"))


def test_a_recipe_that_was_not_written_to_its_end_does_not_stand_in_the_way(begun, tmp_path, monkeypatch):
    recipe = changed(_recipe(begun), "output_dir", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "a.json", "text")
        assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml.part").write_text("mod")  # of a run that was killed
    assert hf_disparse("train", write_recipe(tmp_path, recipe), "--dry-run")[0] == 0
    (tmp_path / "run" / "mine.txt").write_text("")
    refused("train", tmp_path / "recipe.yaml", "--dry-run", names=("output_dir", "holds something else"))
