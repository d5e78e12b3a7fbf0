"""Recipes: what they read, what they refuse, and that nothing but a clear UserError comes out of a bad one."""

import copy
import dataclasses
import platform
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_disparse.config import L0Config, UserError
from hf_disparse.recipes.keys import training_fields
from hf_disparse.recipes.recipe import parse_recipe, public, read_recipe
from hf_disparse.recipes.yaml_text import dump_yaml, parse_yaml
from hf_disparse.runs.analyze import _plain
from hf_disparse.runs.folder import refuse_others
from hf_disparse.trainer.arguments import DisparseTrainingArguments, cpu_has_bfloat16
from tests.helpers.commands import VALID
from tests.helpers.commands import changed as replaced


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


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def changed(section: str, **values) -> dict:
    return {**VALID, section: {**VALID.get(section, {}), **values}}


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
    assert parse_recipe(changed("pruning", seed=7)).pruning.seed == 7


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
    quorum = {**changed("pruning", decision="quorum", quorum=2), "helpers": ["real"]}
    assert "at most the number of tasks, 1" in refusal(parse_recipe, quorum)
    best = {**changed("training", metric_for_best_model="eval_real_pearson"), "helpers": ["real"]}
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


# Refusals


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model: [1", ("does not parse",)),
        ("a: 1\na: 2", ("the key 'a' stands twice", "line 1")),
        ("pruning: {seed: 1, seed: 1}", ("the key 'seed' stands twice",)),
        ("? [a]\n: 1", ("does not parse",)),
        ("", ("an empty file", "model, tasks")),
        ("just words", ("a mapping with the sections", "a text")),
        ("seed: 2020-13-45", ("does not parse", "month")),
        ("a: " + "[" * 3000, ("does not parse",)),
    ],
)
def test_a_file_that_is_no_recipe(write, text, names):
    path = write(text)
    said = refusal(read_recipe, path)
    assert said.startswith(path) and len(said.splitlines()) == 1
    assert all(name in said for name in names), said


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    assert "nowhere.yaml" in refusal(read_recipe, tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "expected YAML, got a file that does not parse: 'utf-8'" in refusal(read_recipe, tmp_path / "binary.yaml")


@pytest.mark.parametrize("section", ["model", "tasks", "output_dir"])
def test_a_missing_section(section):
    for recipe in ({k: v for k, v in VALID.items() if k != section}, {**VALID, section: None}):
        assert refusal(parse_recipe, recipe) == f"recipe: the section '{section}' is required and was not given"


@pytest.mark.parametrize("section", ["training", "recovery", "pruning"])
@pytest.mark.parametrize("value", [[], 0, False, "x"])
def test_a_section_that_is_no_mapping(section, value):
    """Also those values that Python takes for false."""
    assert refusal(parse_recipe, {**VALID, section: value}).startswith(f"{section}: expected a mapping")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "fast", "a number, got 'fast'"),
        ("learning_rate", float("nan"), "a number, got nan"),
        ("learning_rate", -1, "at least 0, got -1"),
        ("max_steps", 1.5, "a whole number, got 1.5"),
        ("max_steps", True, "a whole number, got True"),
        ("per_device_train_batch_size", 0, "at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "at least 1, got 0"),
        ("save_total_limit", 0, "at least 1, got 0"),
        ("use_cpu", "maybe", "true or false, got 'maybe'"),
        ("eval_steps", "x", "a number or null, got 'x'"),
        ("label_names", ["label"], "a recipe measures every task by its labels"),
        ("prediction_loss_only", True, "a recipe measures every task by its labels"),
        ("report_to", 5, "null or a text or a list, got 5"),
        ("lr_scheduler_type", "cosin", "unknown value 'cosin'; did you mean 'cosine'?"),
        ("eval_strategy", False, "put 'no' in quotes"),
        ("metric_for_best_model", "acuracy", "expected one of: average, loss, two_accuracy, two_loss"),
        ("learning_rte", 1, "did you mean 'learning_rate'?"),
        ("seed", 1, "set 'seed' at the top of the recipe"),
        ("push_to_hub", True, "a recipe does not push; `hf-disparse push` uploads the finished run"),
        ("hub_token", "hf_secret", "a recipe does not push"),  # and a card would publish it
        ("bf16_full_eval", True, "evaluates in the precision of training; set bf16: true"),
        ("fp16_full_eval", True, "evaluates in the precision of training; set bf16: true"),
    ],
)
def test_a_training_argument_that_is_refused(key, value, expected):
    for section in ("training", "recovery"):
        said = refusal(parse_recipe, changed(section, **{key: value}))
        assert f".{key}: " in said and expected in said and len(said.splitlines()) == 1, said
        assert "secret" not in said


def test_whole_numbers_and_nothing_pass_where_they_fit():
    recipe = parse_recipe(changed("training", learning_rate=1, save_total_limit=None, report_to=["none"]))
    assert recipe.dense.save_total_limit is None


def test_what_transformers_refuses_is_one_line():
    said = refusal(parse_recipe, changed("training", load_best_model_at_end=True))
    assert said.startswith("training: TrainingArguments refuses these values: ") and "load_best_model_at_end" in said
    assert len(said.splitlines()) == 1 and len(said) < 400


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"teachers": {"two": "x"}},
            "teachers: they are set, but recovery.distillation and recovery.distillation_hidden are both 0",
        ),
        (
            {"training.distillation": 0.5},
            "training.distillation: task 'two' has no teacher in the section 'teachers'",
        ),
        (
            {"training.distillation": 0.5, "teachers": {"two": "x"}},
            "training.distillation: task 'real' has no teacher",
        ),
        (
            {"training.sampling_cap": 9},
            "training.sampling_cap: must not be set without task_sampling: temperature",
        ),
        ({"recovery.sampling_temperature": 2}, "recovery.sampling_temperature: must not be set without task_sampling"),
        (
            {"tasks.two.validation_split": "test", "tasks.two.validation_fraction": 0.1},
            "tasks.two: expected validation_split or validation_fraction, got both; set one of them to null",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(changes, expected):
    recipe = VALID
    for path, value in changes.items():
        recipe = replaced(recipe, path, value)
    said = refusal(parse_recipe, recipe)
    assert said.startswith(expected) and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    "changes",
    [
        {"recovery.distillation": 0.5},
        {"recovery.distillation_hidden": 1, "teachers": {"two": "x"}},
        {"training.distillation": 0.5, "teachers": {"two": "x", "real": "y"}},
        {"training.sampling_cap": 9, "recovery.task_sampling": "temperature"},
        {"tasks.two.glue": "mnli", "tasks.two.validation_fraction": 0.1},  # in place of the split that mnli comes with
    ],
)
def test_what_is_of_use_in_one_phase_passes(changes):
    recipe = VALID
    for path, value in changes.items():
        recipe = replaced(recipe, path, value)
    assert parse_recipe(recipe).values == recipe


def test_bf16_on_a_machine_without_gpu_says_what_to_set(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    said = refusal(parse_recipe, changed("training", bf16=True, use_cpu=False))
    assert said.startswith("training.bf16: ")
    assert "training.use_cpu: true" in said and "training.bf16: false" in said


@pytest.mark.parametrize("section", ["training", "recovery"])
def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, section):
    values = changed(section, bf16=True)
    monkeypatch.setattr("hf_disparse.recipes.arguments.cpu_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=r"^training\.bf16: this CPU has no .* computing in float32$"):
        recipe = parse_recipe(values)
    for phase in ("dense", "sparse"):
        assert not getattr(recipe, phase).bf16
    assert recipe.values == values, "the run can go on where there is bfloat16"
    assert not public(recipe)["arguments"][section].get("bf16"), "a card must not say that bfloat16 was used"


@pytest.mark.filterwarnings("error")
def test_bfloat16_is_used_where_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr("hf_disparse.recipes.arguments.cpu_has_bfloat16", lambda: True)
    recipe = parse_recipe(changed("training", bf16=True))
    assert recipe.dense.bf16 and recipe.sparse.bf16


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file() or platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available(),
    reason="needs Linux on x86-64 and a torch with oneDNN",
)
def test_whether_a_cpu_has_bfloat16_is_what_its_flags_say():
    """oneDNN, which torch asks, multiplies bfloat16 from AVX-512 on."""
    assert cpu_has_bfloat16() == ("avx512bw" in Path("/proc/cpuinfo").read_text())


def test_the_fields_in_the_sources_are_those_of_the_class():
    assert training_fields() == {field.name for field in dataclasses.fields(DisparseTrainingArguments) if field.init}


# Fuzzing


def paths(values: dict, above: tuple = ()) -> list[tuple]:
    """The path of every key of nested mappings."""
    found = []
    for key, value in values.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, (*above, key))
    return found


KEYS = st.one_of(st.text(max_size=6), st.integers(), st.none(), st.sampled_from(["a\nb\nc\nd\n", "labels", "sparsty"]))
JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.just("a\nb\nc\nd")
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


TEXTS = st.text(max_size=6) | st.sampled_from(
    ["1e5", "-2E-5", "2:4", "12:30", "yes", "null", "0x1F", "1_000", "2026-01-02"]
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)))
def test_what_a_run_folder_remembers_reads_as_it_was(values):
    again = parse_yaml(dump_yaml(values))
    assert again == values and repr(again) == repr(values)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_mutated_recipe_parses_or_is_refused_in_three_lines(data):
    """An example takes out, replaces or adds one to three keys. Any other exception than UserError fails the test."""
    recipe = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(paths(recipe) or [("seed",)]))
        place = recipe
        for key in above:
            place = place[key]
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            place.pop(last, None)
        else:
            place[last if action == "replace" else data.draw(KEYS)] = data.draw(JUNK)
    try:
        parsed = parse_recipe(recipe)
    except UserError as error:
        assert 1 <= len(str(error).splitlines()) <= 3, str(error)
    else:
        assert parsed.values == recipe and parsed.tasks and 0 <= parsed.pruning.sparsity < 1


def test_a_recipe_is_refused_for_an_ignored_setting_but_a_run_of_an_earlier_version_opens(tmp_path):
    """Its recipe says what the user asked for then; analysis still scores that many batches."""
    recipe = {**VALID, "output_dir": str(tmp_path / "run"), "seed": 3}
    recipe["pruning"] = {"method": "l0", "sparsity": 0.5, "score_batches": 7}
    assert refusal(parse_recipe, recipe) == "pruning.score_batches: not used by method l0; remove it"
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe))
    opened = read_recipe(path, of_run=True)
    assert opened.pruning == L0Config(sparsity=0.5, seed=3)
    assert read_recipe(path, ["pruning.score_batches=9"], of_run=True).values["pruning"]["score_batches"] == 9
    plain = _plain(opened).pruning
    assert (plain.score_batches, plain.seed) == (7, 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_yaml(recipe))
    refuse_others(tmp_path / "run", parse_recipe({**recipe, "pruning": {"method": "l0", "sparsity": 0.5}}))


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
