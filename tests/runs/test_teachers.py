"""Teachers of a recipe: who teaches what, and that one who cannot is refused before the dense phase."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from hf_disparse import MultitaskModel, TaskConfig, UserError
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.runs.setup import prepare
from hf_disparse.runs.teachers import teachers_of
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, without, write_encoder, write_recipe
from tests.helpers.tiny import tiny_tokenizer

torch.set_num_threads(1)


def teacher(recipe: dict, folder: Path, task: str = "two") -> Path:
    """The finished run of one task of the recipe."""
    for other in set(recipe["tasks"]) - {task}:
        recipe = without(recipe, f"tasks.{other}")
    folder.mkdir()
    path = write_recipe(folder, recipe)
    assert hf_disparse("train", path, "--output_dir", folder / "run", "--no-analysis")[0] == 0
    return folder / "run"


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory) -> Path:
    return teacher(inputs, tmp_path_factory.mktemp("teachers") / "two")


def test_who_is_not_named_is_the_dense_model_and_a_folder_is_loaded_once(recipe, two, monkeypatch):
    loaded = []
    load = MultitaskModel.from_pretrained
    monkeypatch.setattr(MultitaskModel, "from_pretrained", lambda name: loaded.append(name) or load(name))
    recipe = changed(changed(recipe, "recovery.distillation", 0.5), "teachers", {"two": str(two)})
    recipe = changed(recipe, "tasks.again", recipe["tasks"]["two"])
    recipe["teachers"]["again"] = str(two)
    parsed, dense = parse_recipe(recipe), object()
    found = teachers_of(parsed, "sparse", tiny_tokenizer(), lambda: dense)
    assert set(found) == {"two", "again", "three"} and found["two"] is found["again"] and found["three"] is dense
    assert loaded == [str(two)]
    assert teachers_of(parsed, "dense", tiny_tokenizer(), None) is None


def test_a_run_learns_from_the_teacher_of_one_task_and_its_dense_model_for_the_other(recipe, two, tmp_path):
    """By the dense models' results it is one student each time; what the head of `two` becomes depends on who teaches it."""
    dense, heads = [], []
    for name, share, teachers in (("own", 1.0, {}), ("taught", 1.0, {"two": str(two)}), ("alone", 0.0, {})):
        values = changed(recipe, "recovery.distillation", share) | {"output_dir": str(tmp_path / name)}
        values |= {"teachers": teachers}
        assert hf_disparse("train", write_recipe(tmp_path, values), "--no-analysis")[0] == 0
        dense.append(json.loads((tmp_path / name / "results.json").read_text())["dense"])
        heads.append(MultitaskModel.from_pretrained(tmp_path / name).heads["two"].state_dict())
    assert dense[0] == dense[1] == dense[2]
    for one, other in itertools.combinations(heads, 2):
        assert any(not torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("encoder", "key", "names"),
    [
        (
            {"num_hidden_layers": 3},
            "distillation_hidden",
            ("training.distillation_hidden", "match the model", "got 4"),
        ),
        ({"hidden_size": 32}, "distillation_hidden", ("training.distillation_hidden", "width 32")),
        ({"vocab_size": 9}, "distillation", ("teachers.two", "index out of range")),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(recipe, tmp_path, encoder, key, names):
    other = changed(recipe, "model.encoder", str(write_encoder(tmp_path / "encoder")))
    theirs = teacher(other, tmp_path / "theirs")
    task = TaskConfig(name="two", columns="text", labels=["no", "yes"])
    MultitaskModel.from_encoder(write_encoder(tmp_path / "odd", **encoder), [task]).save_pretrained(theirs)
    taught = changed(changed(recipe, f"recovery.{key}", 1), "teachers", {"two": str(theirs)})
    path = write_recipe(tmp_path, taught)
    before = snapshot(tmp_path)
    refused("train", path, names=names)
    assert snapshot(tmp_path) == before


def test_a_teacher_with_fewer_positions_is_refused_though_the_first_text_is_short(recipe, tmp_path):
    data = tmp_path / "two.csv"
    rows = [f"{'w1 ' * (12 if i % 4 == 0 else 3)},{label}" for i, label in enumerate(["no", "yes"] * 16)]
    data.write_text("\n".join(["text,label", *rows]))
    task = TaskConfig(name="two", columns="text", labels=["no", "yes"])
    theirs = write_encoder(tmp_path / "short", max_position_embeddings=8)
    MultitaskModel.from_encoder(theirs, [task]).save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    taught = changed(changed(recipe, "recovery.distillation", 1), "teachers", {"two": str(tmp_path / "theirs")})
    taught = changed(taught, "tasks.two.data", str(data))
    first = prepare(parse_recipe(taught))[1]["train"]["two"][0]
    assert len(first["input_ids"]) < 8, "this proves nothing"
    refused(
        "train", write_recipe(tmp_path, taught), names=("teachers.two: the teacher cannot read the model's inputs",)
    )
    assert not Path(taught["output_dir"]).exists()


def test_a_teacher_with_another_vocabulary_is_refused(recipe, two, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    taught = changed(changed(recipe, "recovery.distillation", 0.5), "teachers", {"two": str(two)})
    parsed = parse_recipe(taught)
    with pytest.raises(UserError, match=r"^teachers.two: the teacher .* does not have the encoder's vocabulary"):
        teachers_of(parsed, "sparse", tokenizer, lambda: None)
    assert prepare(parsed)[0].get_vocab() == tiny_tokenizer().get_vocab()


def test_a_teacher_whose_classes_are_in_another_order_is_refused(recipe, two, tmp_path):
    taught = changed(changed(recipe, "recovery.distillation", 1.0), "teachers", {"two": str(two)})
    path = write_recipe(tmp_path, changed(taught, "tasks.two.labels", ["yes", "no"]))
    refused("train", path, "--dry-run", names=("teachers.two", "('yes', 'no')", "('no', 'yes')"))
