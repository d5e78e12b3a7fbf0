"""Thousands of mistakes in recipes, overrides and configs: each is status 2 and at most three lines that name the key.

Recipes mutated at random are read or refused, and what a run folder remembers reads as it was.
"""

import copy
import datetime
import json
import string
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_disparse import PruningConfig, UserError
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.recipes.yaml_text import dump_yaml, parse_yaml
from hf_disparse.runs import train as run
from tests.helpers.commands import VALID, changed, hf_disparse, without

PLAN = {"examples": {"train": {}, "validation": {}}, "unlabelled": {}, "prunable": 0, "parameters": 0}
MANY = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# Values by what they are not. Dates are what YAML makes of 2020-01-01.
nothing, truth, dates = st.none(), st.booleans(), st.dates(datetime.date(1990, 1, 1), datetime.date(2030, 1, 1))
whole, real = st.integers(-(10**12), 10**12), st.floats(allow_nan=True).filter(lambda x: not float(x).is_integer())
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
some_list = st.lists(st.one_of(whole, texts), max_size=3)
some_dict = st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), whole, max_size=3)
no_text = st.one_of(truth, whole, real, dates, some_list, some_dict)
no_number = st.one_of(truth, texts, dates, some_list, some_dict, st.sampled_from([float("nan"), float("inf")]))
no_whole = st.one_of(no_number, real)
no_truth = st.one_of(texts, whole, real, dates, some_list, some_dict)
no_mapping = st.one_of(texts.filter(bool), whole, truth, real, dates, some_list)


def below(least: int):
    return st.integers(-(10**12), least - 1)


def other_than(*known: str):
    return st.one_of(texts, truth, real, some_list).filter(lambda value: value not in known)


# key of VALID -> values that cannot be right there
WRONG = {
    "model": no_mapping,
    "model.encoder": st.one_of(no_text, nothing, st.just("")),
    "model.max_length": st.one_of(no_whole, nothing, below(3)),
    "tasks": st.one_of(no_mapping, st.just({})),
    "tasks.two": st.one_of(no_mapping, nothing),
    "tasks.two.data": st.one_of(no_text, nothing, st.just("")),
    "tasks.two.subset": no_text,
    "tasks.two.train_split": st.one_of(no_text, nothing),
    "tasks.two.columns": st.one_of(truth, whole, dates, some_dict, nothing, st.just([]), st.just(["a", "b", "c"]), st.just("")),
    "tasks.two.label_column": st.one_of(no_text, nothing, st.just("")),
    "tasks.two.labels": st.one_of(truth, whole, dates, some_dict, nothing, st.just(["one"]), st.just(["a", "a"]), st.just([0, 1])),
    "tasks.two.problem_type": other_than("single_label_classification", "multi_label_classification"),
    "tasks.two.metric": st.one_of(truth, whole, dates, other_than("accuracy", "f1", "matthews_correlation", [])),
    "tasks.two.weight": st.one_of(no_number, nothing, below(1)),
    "tasks.two.validation_fraction": st.one_of(no_number, whole),
    "tasks.two.max_train_rows": st.one_of(no_whole, below(1)),
    "tasks.two.options": st.one_of(no_mapping, nothing),
    "tasks.two.glue": other_than("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "mnli_matched", "ax"),
    "helpers": st.one_of(texts.filter(bool), whole, truth, some_dict, st.just(["two", "real"]), st.just(["no such"])),
    "teachers": st.one_of(no_mapping, st.just({"no such": "x"}), st.just({"two": 3})),
    "pruning": no_mapping,
    "pruning.method": other_than("saliency", "dynamic", "movement", "platon", "l0", "rank", "flop", "group_lasso"),
    "pruning.sparsity": st.one_of(no_number, nothing, whole.filter(bool)),
    "pruning.criterion": other_than("magnitude", "snip", "disparse", "fisher", "random", "taylor", "agreement"),
    "pruning.decision": other_than("unanimous", "quorum", "joint", "sum", "max", "mean_rank"),
    "pruning.quorum": st.one_of(no_whole, nothing, below(1), st.integers(2)),
    "pruning.granularity": st.one_of(truth, whole, some_dict, texts.filter(lambda t: t not in ("weight", "head", "neuron", "layer"))),
    "pruning.schedule": other_than("one_shot", "cubic"),
    "pruning.start_step": st.one_of(no_whole, nothing, below(0)),
    "pruning.update_every": st.one_of(no_whole, nothing, below(1)),
    "pruning.end_step": st.one_of(no_whole, nothing, below(1)),
    "pruning.score_batches": st.one_of(no_whole, nothing, below(1)),
    "pruning.target_modules": st.one_of(truth, whole, some_dict, st.just([]), st.sampled_from(["[", "(", "*", "(?P<", "(?R)", "(" * 3000, "((a{999}){999}){9}"])),
    "pruning.seed": st.one_of(no_whole, nothing, below(0), st.integers(2**32)),
    "pruning.max_drop": st.one_of(texts, truth, dates, below(0), st.integers(101), st.just({}), st.just({"two": "x"})),
    "pruning.reconstruct": st.one_of(no_truth, nothing),
    "pruning.reinitialise": st.one_of(no_truth, nothing),
    "pruning.keep_scores": st.one_of(no_truth, nothing),
    "training": no_mapping,
    "training.max_steps": st.one_of(no_whole, nothing),
    "training.learning_rate": st.one_of(no_number, nothing, below(0)),
    "training.per_device_train_batch_size": st.one_of(no_whole, nothing, below(1)),
    "training.gradient_accumulation_steps": st.one_of(no_whole, nothing, below(1)),
    "training.use_cpu": st.one_of(no_truth, nothing),
    "training.lr_scheduler_type": texts,
    "training.task_sampling": other_than("proportional", "temperature", "round_robin"),
    "training.loss_weighting": other_than("fixed", "uncertainty", "pcgrad"),
    "recovery": no_mapping,
    "recovery.max_steps": st.one_of(no_whole, nothing),
    "recovery.save_total_limit": st.one_of(no_whole, below(1)),
    "seed": st.one_of(no_whole, below(0), st.integers(2**32)),
    "output_dir": st.one_of(no_text, nothing, st.just("")),
}  # fmt: skip
KNOWN = {key.rpartition(".")[2] for key in WRONG}
PLACES = ["", "model.", "tasks.two.", "pruning.", "training.", "recovery."]
REQUIRED = ["model", "tasks", "output_dir", "model.encoder", "tasks.two.data", "tasks.two.columns", "tasks.two.labels"]
unknown_keys = st.text(string.ascii_letters + "_- é漢🙂", min_size=1, max_size=12).filter(lambda k: k not in KNOWN)


@st.composite
def mistakes(draw) -> tuple[dict, str]:
    """A recipe with one mistake, and what must be named."""
    kind = draw(st.sampled_from(["value", "value", "value", "key", "missing"]))
    if kind == "missing":
        key = draw(st.sampled_from(REQUIRED))
        return without(VALID, key), key.rpartition(".")[2]
    if kind == "key":
        name = draw(unknown_keys)
        return changed(VALID, draw(st.sampled_from(PLACES)) + name, draw(texts)), name
    key = draw(st.sampled_from(sorted(WRONG)))
    return changed(VALID, key, draw(WRONG[key])), key.rpartition(".")[2]


def said(status: int, out: str, err: str) -> str:
    """What a refusal says; fails where it is none."""
    assert status == 2, (status, err)
    assert out == "" and err.startswith("error: ") and 1 <= len(err.splitlines()) <= 3, err
    return err


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Of a recipe; what is beyond its checks is cut off."""
    monkeypatch.setattr(run, "plan", lambda recipe: PLAN)
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
@given(mistake=mistakes())
@settings(max_examples=1200, **MANY)
def test_a_mistake_in_a_recipe_is_named(path, mistake):
    recipe, name = mistake
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    assert name in said(*hf_disparse("train", path, "--dry-run"))


@pytest.mark.slow
@given(key=st.sampled_from(sorted(WRONG)), data=st.data())
@settings(max_examples=300, **MANY)
def test_a_mistake_in_an_override_is_named(path, key, data):
    path.write_text(yaml.safe_dump(VALID), encoding="utf-8")
    text = yaml.safe_dump(data.draw(WRONG[key]), allow_unicode=True, default_flow_style=True, width=10**6)
    text = text.removesuffix("\n").removesuffix("\n...")
    answer = hf_disparse("train", path, "--dry-run", "--set", f"{key}={text}")
    assert key.rpartition(".")[2] in said(*answer)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=300, **MANY)
def test_a_recipe_whose_text_was_damaged_is_read_or_refused(path, data):
    """Characters taken out, put in, doubled: some of that is still a recipe."""
    text = yaml.safe_dump(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(text)))
        last = data.draw(st.integers(first, min(first + 5, len(text))))
        text = text[:first] + data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)) + text[last:]
    path.write_text(text, encoding="utf-8")
    status, out, err = hf_disparse("train", path, "--dry-run")
    assert (status, err) == (0, "") or said(status, out, err)


@pytest.mark.slow
@given(key=st.sampled_from(sorted(key for key in WRONG if key.startswith("pruning."))), data=st.data())
@settings(max_examples=200, **MANY)
def test_a_mistake_in_a_pruning_config_is_named(tmp_path, key, data):
    name = key.removeprefix("pruning.")
    value = data.draw(WRONG[key].filter(lambda v: not isinstance(v, datetime.date)))
    values = {**PruningConfig(schedule="cubic", end_step=9).to_dict(), name: value}
    (tmp_path / "pruning_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=name) as caught:
        PruningConfig.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.slow
@given(mistake=mistakes())
@settings(max_examples=20, phases=[Phase.generate], **MANY)
def test_a_mistake_is_named_by_the_command(tmp_path, mistake):
    recipe, name = mistake
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "from hf_disparse.cli.main import main; main()",
        "train",
        str(tmp_path / "recipe.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert name in said(done.returncode, done.stdout, done.stderr)


# Without the command


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
