"""Recipes: what they read, and what overrides change."""

import pytest
import yaml

from hf_disparse.recipes.recipe import parse_recipe, read_recipe
from tests.helpers.commands import VALID, refusal, valid_with


@pytest.fixture
def write(tmp_path):
    """Writes a recipe's text and returns its path."""

    def write_text(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write_text


@pytest.fixture
def valid(write):
    return write(yaml.safe_dump(VALID))


# Reading


@pytest.mark.parametrize(
    ("written", "number"), [("2e-5", 2e-5), ("1E3", 1000.0), ("-1.5e+2", -150.0), ("3.e1", 30.0), ("0.5", 0.5)]
)
def test_a_number_with_an_exponent_is_a_number(valid, written, number):
    """YAML 1.1 reads 2e-5 as a string."""
    value = read_recipe(valid, [f"tasks.two.options.x={written}"]).tasks["two"][1].options["x"]
    assert type(value) is float and value == number


def test_what_only_looks_like_a_number_stays_text(valid):
    for text in ("2e-5x", "e5", "-e"):
        assert read_recipe(valid, [f"model.encoder={text}"]).model.encoder == text


def test_defaults(write):
    recipe = read_recipe(
        write("{model: {encoder: e}, tasks: {t: {data: d, columns: c, labels: [x, y]}}, output_dir: o}")
    )
    assert (recipe.seed, recipe.training, recipe.recovery) == (0, {}, {})
    assert recipe.model.max_length == 128
    assert (recipe.pruning.sparsity, recipe.pruning.criterion, recipe.pruning.decision) == (
        0.8,
        "disparse",
        "unanimous",
    )
    task, data = recipe.tasks["t"]
    assert (task.name, task.columns, task.metric, task.weight) == ("t", ("c",), ("accuracy",), 1.0)
    assert (data.train_split, data.validation_split) == ("train", "validation")


def test_the_seed_of_the_recipe_is_that_of_pruning_unless_it_has_its_own():
    assert parse_recipe(VALID).pruning.seed == 3
    assert parse_recipe(valid_with("pruning", seed=7)).pruning.seed == 7


def test_recovery_differs_from_training_in_the_sparse_phase_only():
    recipe = parse_recipe(VALID)
    dense, sparse = recipe.dense, recipe.sparse
    assert (dense.learning_rate, sparse.learning_rate) == (2e-5, 1e-5)
    assert dense.max_steps == sparse.max_steps == 8
    assert dense.seed == sparse.seed == 3


@pytest.mark.parametrize(
    ("helpers", "expected"),
    [
        ("two", "a list of tasks"),
        (["tow"], "did you mean 'two'?"),
        ([["two"]], "there is no task"),
        (["two", "two"], "names that differ"),
        (["two", "real"], "fewer names than there are tasks"),
    ],
)
def test_helpers_are_some_of_the_tasks(helpers, expected):
    assert expected in refusal(parse_recipe, {**VALID, "helpers": helpers})


def test_a_helper_has_no_vote_and_no_metric():
    assert parse_recipe({**VALID, "helpers": ["real"]}).helpers == ("real",)
    quorum = {**valid_with("pruning", decision="quorum", quorum=2), "helpers": ["real"]}
    assert "at most the number of tasks, 1" in refusal(parse_recipe, quorum)
    best = {**valid_with("training", metric_for_best_model="eval_real_pearson"), "helpers": ["real"]}
    assert "has no 'eval_real_pearson'" in refusal(parse_recipe, best)


def test_a_home_folder_is_expanded_as_transformers_expands_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse_recipe({**VALID, "output_dir": "~/run"})
    assert recipe.output_dir == str(tmp_path / "run") == recipe.dense.output_dir


def test_anchors_and_merge_keys_are_yaml_too(write):
    text = yaml.safe_dump({k: v for k, v in VALID.items() if k != "tasks"}) + (
        "tasks:\n  a: &a {data: d, columns: [c], labels: [x, y]}\n  b: {<<: *a, data: other}\n"
    )
    tasks = read_recipe(write(text)).tasks
    assert (tasks["b"][1].data, tasks["b"][0].labels) == ("other", ("x", "y"))


def test_an_override_of_one_task_leaves_an_alias_of_it_alone(write):
    text = yaml.safe_dump({k: v for k, v in VALID.items() if k != "tasks"}) + (
        "tasks:\n  a: &a {data: d, columns: [c], labels: [x, y]}\n  b: *a\n"
    )
    tasks = read_recipe(write(text), ["tasks.a.max_train_rows=5"]).tasks
    assert [data.max_train_rows for _, data in tasks.values()] == [5, None]


# Overrides


def test_overrides_replace_and_add_in_order(valid):
    recipe = read_recipe(valid, ["pruning.sparsity=0.5", "seed=9", "recovery.max_steps=5", "seed=10"], "elsewhere")
    assert (recipe.pruning.sparsity, recipe.seed, recipe.output_dir) == (0.5, 10, "elsewhere")
    assert recipe.recovery == {"learning_rate": 1e-5, "max_steps": 5}
    assert recipe.values["pruning"]["sparsity"] == 0.5


def test_an_override_may_hold_an_equals_sign_and_a_list(valid):
    recipe = read_recipe(valid, ["model.encoder=a=b", "tasks.two.columns=[p, q]"])
    assert (recipe.model.encoder, recipe.tasks["two"][0].columns) == ("a=b", ("p", "q"))


def test_a_star_stands_for_every_task(valid):
    recipe = read_recipe(valid, ["tasks.*.max_train_rows=7"])
    assert [data.max_train_rows for _, data in recipe.tasks.values()] == [7, 7]


def test_an_override_fills_a_section_that_is_only_a_heading(write):
    path = write(yaml.safe_dump({**VALID, "pruning": None}))
    assert read_recipe(path, ["pruning.sparsity=0.5"]).pruning.sparsity == 0.5


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("pruning.sparsity", ("overrides: ", "section.key=value", "'pruning.sparsity'")),
        ("=3", ("section.key=value",)),
        ("pruning..sparsity=1", ("section.key=value",)),
        ("seed=[1", ("overrides: ", "YAML", "'seed='", "'[1'")),
        ("model.encoder.x=1", ("overrides: ", "a mapping at 'model.encoder'", "some/encoder")),
        ("optimizer.*.x=1", ("overrides: ", "'*' in 'optimizer.*'")),
        ("prunning.sparsity=1", ("prunning", "did you mean 'pruning'")),
        ("tasks.*.data=", (".data: expected", "None")),
    ],
)
def test_an_override_that_makes_no_sense(valid, override, names):
    text = refusal(read_recipe, valid, [override])
    assert all(name in text for name in names), text


def test_the_recipes_seed_goes_to_methods_that_draw_numbers():
    recipe = {**VALID, "seed": 3}
    for method, seed in (
        ("saliency", 3),
        ("dynamic", 3),
        ("l0", 3),
        ("platon", 0),
        ("movement", 0),
        ("group_lasso", 0),
    ):
        assert parse_recipe({**recipe, "pruning": {"method": method, "sparsity": 0.5}}).pruning.seed == seed
