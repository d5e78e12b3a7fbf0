"""Recipes that are refused: nothing but a clear UserError comes out of a bad one."""

import dataclasses
import platform
from pathlib import Path

import pytest
import torch

from hf_disparse.config import L0Config
from hf_disparse.recipes.keys import training_fields
from hf_disparse.recipes.recipe import parse_recipe, public, read_recipe
from hf_disparse.recipes.yaml_text import dump_yaml
from hf_disparse.runs.analyze import _plain
from hf_disparse.runs.folder import refuse_others
from hf_disparse.trainer.arguments import DisparseTrainingArguments, cpu_has_bfloat16
from tests.helpers.commands import VALID, changed, refusal, valid_with, write_recipe


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
def test_a_file_that_is_no_recipe(tmp_path, text, names):
    path = write_recipe(tmp_path, text)
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
        said = refusal(parse_recipe, valid_with(section, **{key: value}))
        assert f".{key}: " in said and expected in said and len(said.splitlines()) == 1, said
        assert "secret" not in said


def test_whole_numbers_and_nothing_pass_where_they_fit():
    recipe = parse_recipe(valid_with("training", learning_rate=1, save_total_limit=None, report_to=["none"]))
    assert recipe.dense.save_total_limit is None


def test_what_transformers_refuses_is_one_line():
    said = refusal(parse_recipe, valid_with("training", load_best_model_at_end=True))
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
        recipe = changed(recipe, path, value)
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
        recipe = changed(recipe, path, value)
    assert parse_recipe(recipe).values == recipe


def test_bf16_on_a_machine_without_gpu_says_what_to_set(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    said = refusal(parse_recipe, valid_with("training", bf16=True, use_cpu=False))
    assert said.startswith("training.bf16: ")
    assert "training.use_cpu: true" in said and "training.bf16: false" in said


@pytest.mark.parametrize("section", ["training", "recovery"])
def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, section):
    values = valid_with(section, bf16=True)
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
    recipe = parse_recipe(valid_with("training", bf16=True))
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
