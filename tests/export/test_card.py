"""Model cards state what the folder holds, their code runs, and the Hub's own library reads them."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel

from hf_disparse import MultitaskConfig, MultitaskModel, PruningConfig, UserError
from hf_disparse.export import save_packed, write_card
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.report.values import speed_cells
from hf_disparse.runs import train as run
from tests.helpers.commands import hf_disparse, write_inputs
from tests.helpers.tiny import CONFIGS, three_tasks, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    recipe = write_inputs(folder)
    recipe["output_dir"] = str(folder / "out")
    return folder / "out", run.train(parse_recipe(recipe)), recipe


def section(card: ModelCard, title: str) -> str:
    return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", card.text, re.DOTALL)[1]


def table(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_a_run_writes_its_card_and_the_hub_s_library_reads_the_metrics(finished):
    folder, results, _ = finished
    card = ModelCard.load(folder / "README.md")
    parsed = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    values = {(t, m): v for t, metrics in results["sparse"]["tasks"].items() for m, v in metrics.items()}
    assert {key: r.metric_value for key, r in parsed.items()} == pytest.approx(values, abs=0.006)
    assert all(r.task_type == "text-classification" and r.dataset_split == "25 % of train" for r in parsed.values())
    assert card.data.library_name == "transformers" and card.data.model_name == "out"
    assert card.data.base_model is None, "a local encoder has no Hub id"
    assert yaml.safe_load(card.data.to_yaml())["model-index"][0]["name"] == "out"


def test_its_tables_are_those_of_the_results_and_of_an_independent_count(finished):
    folder, results, _ = finished
    card = ModelCard.load(folder / "README.md")
    rows = {(row[0], row[3]): row[4:] for row in table(section(card, "Metrics"))[1:]}
    for task, metrics in results["sparse"]["tasks"].items():
        for metric, sparse in metrics.items():
            dense = results["dense"]["tasks"][task][metric]
            assert rows[task, metric] == [f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}"]
    size = {row[0]: row[1] for row in table(section(card, "Size and speed"))[1:]}
    model = AutoModel.from_pretrained(folder)
    zeros = torch.cat([(p == 0).flatten() for p in model.encoder.parameters()])
    assert size["zeros in the encoder"] == f"{100 * zeros.float().mean():.1f} %"
    assert size["zeros among the prunable weights"] == "70.0 %"
    assert size["bytes of the weights' file"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert size["form of the file"].startswith("plain")
    assert [float(v) > 0 for k, v in size.items() if k.startswith("milliseconds")] == [True, True]
    assert [tuple(row) for row in table(section(card, "Size and speed"))[-3:]] == speed_cells(results["speed"])
    assert "Texts of 16 tokens" in card.text
    log = table(section(card, "Training"))[1:]
    assert {row[0] for row in log} == {"dense", "sparse"} and log[-1][3] == "70.0 %"


def test_it_names_no_path_of_this_machine(finished):
    folder, _, recipe = finished
    for name in ("README.md", "results.json"):
        text = (folder / name).read_text()
        assert str(folder.parent) not in text and recipe["model"]["encoder"] not in text


def test_the_snippet_runs(finished, monkeypatch):
    folder, _, _ = finished
    monkeypatch.chdir(folder.parent)
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    shown = []
    exec(code, {"print": shown.append})
    assert set(shown[0]) == {"two", "three"}


def test_an_exported_folder_has_a_card_of_its_own(finished, tmp_path):
    folder, _, _ = finished
    assert hf_disparse("export", folder, "--output_dir", tmp_path / "small")[0] == 0
    card = ModelCard.load(tmp_path / "small" / "README.md")
    size = {row[0]: row[1] for row in table(section(card, "Size and speed"))[1:]}
    assert size["form of the file"].startswith("packed")
    assert size["bytes of the weights' file"] == f"{(tmp_path / 'small' / 'model.safetensors').stat().st_size:,}"
    assert card.data.model_name == "small" and len(card.data.eval_results) == 2
    assert "Texts of 16 tokens" in card.text  # as in training


def test_hub_ids_and_a_licence(finished, tmp_path):
    folder, _, _ = finished
    save_packed(folder, tmp_path / "small")
    values = json.loads((tmp_path / "small" / "results.json").read_text())
    values["recipe"] |= {"encoder": "google-bert/bert-base-uncased"}
    values["recipe"]["data"]["two"] = {"data": "nyu-mll/glue", "subset": "rte", "split": "validation"}
    (tmp_path / "small" / "results.json").write_text(json.dumps(values))
    card = write_card(tmp_path / "small", name="me/small", license="apache-2.0")
    again = ModelCard.load(tmp_path / "small" / "README.md")
    assert again.content == card.content
    assert again.data.base_model == "google-bert/bert-base-uncased" and again.data.license == "apache-2.0"
    assert again.data.datasets == ["nyu-mll/glue"]
    [rte] = [r for r in again.data.eval_results if r.dataset_type == "nyu-mll/glue"]
    assert (rte.dataset_config, rte.dataset_split) == ("rte", "validation")
    assert 'from_pretrained("me/small")' in again.text


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_has_one(model_type, tmp_path):
    model = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[model_type](), tasks=three_tasks()))
    model.save_pretrained(tmp_path)
    assert "62 tokens" in write_card(tmp_path).text  # as many as these tiny encoders have positions for


def test_a_model_without_results_has_a_card_that_claims_none(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    card = write_card(tmp_path)
    assert not any(words in card.text for words in ("pruned, by", "## Metrics", "metrics come", "adapters"))
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


@pytest.mark.parametrize(
    ("pruning", "said"),
    [
        ({}, "by what all tasks can spare, each task judging by the criterion `disparse`"),
        ({"decision": "quorum", "quorum": 2}, "by what fewer than 2 tasks want, each task judging"),
        ({"decision": "joint", "criterion": "snip"}, "by the criterion `snip` of the summed loss of all tasks"),
        (
            {"reconstruct": True},
            "each task judging by the criterion `disparse`. The remaining weights were then refitted",
        ),
        ({"criterion": "magnitude"}, "by the criterion `magnitude`, which is the same for all tasks"),
        ({"method": "dynamic"}, "dropped by magnitude, grown where any task wants it most"),
        ({"method": "dynamic", "decision": "joint"}, "dropped by magnitude, grown where the summed loss wants it most"),
        ({"method": "movement"}, "by movement pruning: what all tasks can spare"),
        ({"method": "platon", "decision": "joint"}, "by PLATON's sensitivity: the summed loss of all tasks"),
        ({"method": "l0"}, "gates that all tasks trained together (L0)"),
        ({"method": "flop"}, "gates that all tasks trained together (FLOP)"),
        ({"method": "group_lasso"}, "those of the smallest norms"),
    ],
)
def test_it_says_by_what_the_method_at_hand_pruned(tmp_path, pruning, said):
    tiny_model().save_pretrained(tmp_path)
    PruningConfig.from_dict({"sparsity": 0.5, **pruning}).save_pretrained(tmp_path)
    text = write_card(tmp_path).text
    sentence = text[text.index("50 % of the ") : text.index(".\n")]
    assert said in sentence
    assert ("each task judging" in text) == ("each task judging" in said)


def test_the_results_of_another_program_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for values in ({"recipe": []}, {"recipe": {"encoder": 5}}, {"environment": [1]}):
        (tmp_path / "results.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"results\.json: not what training writes \(.*\)\.\nRestore the original"):
            write_card(tmp_path)
