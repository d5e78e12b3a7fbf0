"""Configs refuse nonsense at birth and outlive the code that wrote them."""

import dataclasses
import json

import pytest

from hf_disparse import DataConfig, PruningConfig, TaskConfig, UserError
from hf_disparse.config import PRUNING_CONFIG_NAME


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
        ({"quorum": 2}, "quorum: expected 1 with decision 'unanimous'"),
        ({"quorum": 0, "decision": "quorum"}, "quorum: expected a whole number of at least 1"),
        ({"score_batches": 1.5}, "score_batches: expected a whole number"),
        ({"schedule": "cubic"}, "end_step: expected a step after start_step 0"),
        ({"schedule": "cubic", "start_step": 5, "end_step": 5}, "end_step: expected a step after start_step 5"),
        ({"end_step": 5}, "end_step: expected nothing with schedule one_shot"),
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
        ({"name": "average"}, "name: expected another name"),
        ({"columns": []}, "columns: expected a name"),
        ({"columns": ["a", "b", "c"]}, "columns: expected at most 2"),
        ({"columns": ["a", "a"]}, "columns: expected names that differ"),
        ({"problem_type": "classification"}, "problem_type: unknown value 'classification'; did you mean"),
        ({"problem_type": []}, "problem_type: unknown value"),
        ({"labels": ["one"]}, "labels: expected the names of at least 2 classes"),
        ({"labels": ["one", "one"]}, "labels: expected names that differ"),
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
