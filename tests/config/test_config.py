"""Configs validate themselves when created and outlive the code that wrote them."""

import dataclasses
import json
from pathlib import Path

import pytest

import hf_disparse
from hf_disparse import DataConfig, PruningConfig, TaskConfig, UserError
from hf_disparse.config import (
    METHOD_CONFIGS,
    PRUNING_CONFIG_NAME,
    FlopConfig,
    GroupLassoConfig,
    L0Config,
    MovementConfig,
    PlatonConfig,
    RankConfig,
)
from hf_disparse.methods import Method, method_class


def test_pruning_config_round_trips_through_a_folder(tmp_path):
    config = PruningConfig(
        sparsity=0.9,
        criterion="snip",
        decision="quorum",
        quorum=2,
        schedule="cubic",
        end_step=9,
        target_modules=["query"],
    )
    config.save_pretrained(tmp_path / "new")
    assert PruningConfig.from_pretrained(tmp_path / "new") == config
    written = json.loads((tmp_path / "new" / PRUNING_CONFIG_NAME).read_text())
    assert written["method"] == "saliency"
    assert written["version"] == 1


def test_pruning_config_is_small_frozen_and_keyword_only():
    assert len(dataclasses.fields(PruningConfig)) <= 17
    with pytest.raises(dataclasses.FrozenInstanceError):
        PruningConfig().sparsity = 0.1
    with pytest.raises(TypeError):
        PruningConfig(0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"sparsity": float("nan")}, "sparsity: expected a number"),
        ({"sparsity": True}, "sparsity: expected a number"),
        ({"sparsity": "0.5"}, "sparsity: expected a number"),
        ({"criterion": "sinp"}, "criterion: unknown value 'sinp'; did you mean 'snip'"),
        ({"decision": "unanimus"}, "did you mean 'unanimous'"),
        ({"schedule": 3}, "schedule: unknown value 3; expected one of: one_shot, cubic"),
        ({"quorum": 2}, "quorum: must be 1 with decision 'unanimous', got 2; set decision: quorum"),
        ({"quorum": 0, "decision": "quorum"}, "quorum: expected a whole number of at least 1"),
        ({"score_batches": 1.5}, "score_batches: expected a whole number"),
        ({"schedule": "cubic"}, "end_step: expected a step after start_step 0"),
        ({"schedule": "cubic", "start_step": 5, "end_step": 5}, "end_step: expected a step after start_step 5"),
        ({"end_step": 5}, "end_step: not used with schedule one_shot; remove it"),
        ({"target_modules": "["}, "target_modules: not a regular expression"),
        ({"target_modules": "(?R)"}, "target_modules: not a regular expression"),
        ({"target_modules": "(" * 900}, "target_modules: not a regular expression"),
        ({"target_modules": "a" * 1001}, "target_modules: expected a regular expression of at most 1,000 characters"),
        ({"exclude_modules": "((a{999}){999}){999}"}, "exclude_modules: .* multiply to at most 10,000"),
        ({"target_modules": []}, "target_modules: expected a name or a list of names"),
    ],
)
def test_pruning_config_refuses_nonsense_with_key_expected_and_got(values, words):
    with pytest.raises(UserError, match=words):
        PruningConfig(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a.b"}, "name: expected letters"),
        ({"name": ""}, "name: expected letters"),
        ({"name": "average"}, "name: 'average' is reserved"),
        ({"columns": []}, "columns: expected a name"),
        ({"columns": ["a", "b", "c"]}, "columns: expected at most 2"),
        ({"columns": ["a", "a"]}, "columns: expected distinct names"),
        ({"problem_type": "classification"}, "problem_type: unknown value 'classification'; did you mean"),
        ({"problem_type": []}, "problem_type: unknown value"),
        ({"labels": ["one"]}, "labels: expected the names of at least 2 classes"),
        ({"labels": ["one", "one"]}, "labels: expected distinct names"),
        ({"labels": [0, 1]}, "labels: expected names, got .0, 1.; put them in quotes"),
        ({"problem_type": "regression"}, "labels: expected none for regression"),
        ({"metric": "acuracy"}, "metric: 'acuracy' does not fit single_label_classification; did you mean 'accuracy'"),
        ({"metric": False}, "metric: expected a name or a list of names, got False"),
        ({"weight": 0}, "weight: expected a number above 0"),
        ({"problem_type": "token_classification", "columns": ["a", "b"]}, "columns: expected at most 1"),
    ],
)
def test_task_config_refuses_nonsense(values, words):
    with pytest.raises(UserError, match=words):
        TaskConfig(**{"name": "t", "columns": "text", "labels": ["a", "b"], **values})


def test_metric_defaults_to_the_first_of_the_problem_type():
    assert TaskConfig(name="t", columns="text", labels=["a", "b"]).metric == ("accuracy",)
    assert TaskConfig(name="t", columns="text", problem_type="regression").metric == ("pearson",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": ""}, "data: expected a Hub id"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a number"),
        ({"max_train_rows": 0}, "max_train_rows: expected a whole number"),
        ({"options": ["x"]}, "options: expected a mapping"),
    ],
)
def test_data_config_refuses_nonsense(values, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**{"data": "x.csv", **values})


def test_a_mistyped_key_names_the_closest_field():
    with pytest.raises(UserError, match=r"pruning\.sparsty: there is no such field; did you mean 'sparsity'\?"):
        PruningConfig.from_dict({"sparsty": 0.5}, "pruning")


def test_fields_of_a_newer_version_warn_and_those_of_this_one_do_not_pass():
    values = PruningConfig().to_dict() | {"novelty": 1}
    with pytest.raises(UserError, match="novelty"):
        PruningConfig.from_dict(values)
    with pytest.warns(UserWarning, match="ignoring 'novelty' of format version 2"):
        assert PruningConfig.from_dict(values | {"version": 2}) == PruningConfig()


def test_the_method_in_the_file_chooses_the_subclass():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OtherConfig(PruningConfig):
        method = "other"
        extra: int = 1

    loaded = PruningConfig.from_dict({"method": "other", "extra": 5})
    assert type(loaded) is OtherConfig
    assert loaded.extra == 5
    with pytest.raises(UserError, match="method: unknown value 'othr'; did you mean 'other'"):
        PruningConfig.from_dict({"method": "othr"})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sparsity": 2}'])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / PRUNING_CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match=PRUNING_CONFIG_NAME):
        PruningConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(UserError, match="there is no such file; was this model pruned"):
        PruningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        (L0Config, {"score_batches": 64}, "by method l0"),
        (L0Config, {"update_every": 7}, "by method l0"),
        (FlopConfig, {"score_batches": 64}, "by method flop"),
        (PlatonConfig, {"score_batches": 64}, "by method platon"),
        (PlatonConfig, {"seed": 1}, "by method platon"),
        (MovementConfig, {"score_batches": 64}, "by method movement"),
        (MovementConfig, {"seed": 1}, "by method movement"),
        (MovementConfig, {"threshold": 0.2}, "with mode hard"),
        (MovementConfig, {"penalty": 2.0}, "with mode hard"),
        (MovementConfig, {"score_learning_rate": 0.2}, "with mode hard"),
        (GroupLassoConfig, {"score_batches": 64}, "by method group_lasso"),
        (GroupLassoConfig, {"update_every": 7}, "by method group_lasso"),
        (GroupLassoConfig, {"seed": 1}, "by method group_lasso"),
        (GroupLassoConfig, {"exclude_modules": ["query"]}, "where a neuron is pruned as a whole"),
        (PruningConfig, {"update_every": 7}, "with schedule one_shot"),
        (PruningConfig, {"end_step": 7}, "with schedule one_shot"),
        (RankConfig, {"update_every": 7}, "with schedule one_shot"),
        (PruningConfig, {"granularity": ["layer"], "target_modules": "query"}, "where a layer is pruned as a whole"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_but_loads_from_a_file(tmp_path, config, settings, why):
    """Earlier versions wrote such files."""
    key, value = list(settings.items())[-1]
    with pytest.raises(UserError, match=f"^{key}: not used {why}; remove it$"):
        config(**settings)
    others = {name: given for name, given in settings.items() if name != key}
    expected = config(**others)
    default = getattr(expected, key)
    assert config(**others, **{key: default}) == expected, "a default is always accepted"
    written = {**expected.to_dict(), key: value}
    with pytest.raises(UserError, match=f"^pruning.{key}: not used"):
        PruningConfig.from_dict(written, "pruning")
    (tmp_path / PRUNING_CONFIG_NAME).write_text(json.dumps(written))
    assert PruningConfig.from_pretrained(tmp_path) == expected


def test_settings_that_a_method_uses_are_not_refused():
    MovementConfig(mode="soft", threshold=0.2, penalty=2.0, score_learning_rate=0.2, update_every=7)
    PlatonConfig(update_every=7)
    L0Config(seed=1)
    GroupLassoConfig(granularity="channel", target_modules=["query"])
    RankConfig(schedule="cubic", end_step=9, update_every=7, target_modules=["query"], seed=1, score_batches=4)
    PruningConfig(criterion="magnitude", score_batches=4, seed=1)  # `compare` counts the batches in its budget


def test_every_method_has_a_config_and_a_file_and_says_what_others_need():
    assert {path.stem for path in Path(hf_disparse.__file__).parent.glob("methods/*.py")} >= {
        config.method for config in METHOD_CONFIGS
    }
    names = [name for config in METHOD_CONFIGS for name in config.rows]
    assert len(names) == len(set(names))
    for config in METHOD_CONFIGS:
        assert config.rows and config().chosen_by() and config.__doc__
        assert issubclass(method_class(config), Method)
        assert set(config.unused) <= {field.name for field in dataclasses.fields(config)}


def test_a_method_takes_at_most_four_files_of_the_package_and_a_test():
    """CONTRIBUTING.md lists them; PLATON is the example."""
    package = Path(hf_disparse.__file__).parent
    mentions = {
        p.relative_to(package)
        for p in package.rglob("*.py*")
        if p.suffix in (".py", ".pyi") and "platon" in p.read_text().lower()
    }
    assert {str(path) for path in mentions} == {
        "__init__.pyi",
        "config/__init__.py",
        "config/platon.py",
        "methods/platon.py",
    }
