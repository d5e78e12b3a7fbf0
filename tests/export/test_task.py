"""A task as a plain model gives the same logits and loads with plain transformers, without this package."""

import json
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_disparse import MultitaskConfig, MultitaskModel, TaskConfig, UserError, compact, save_packed
from hf_disparse.export import save_tasks, task_model
from tests.helpers.commands import refused
from tests.helpers.compacting import BATCH, close, model_of, prune_parts
from tests.helpers.tiny import CONFIGS, three_tasks, tiny_model, tiny_tokenizer

TAGS = TaskConfig(name="tags", columns="tokens", labels=["O", "X", "Y"], problem_type="token_classification")


def model_with_tags(model_type: str) -> MultitaskModel:
    torch.manual_seed(0)
    model = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[model_type](), tasks=[*three_tasks(), TAGS]))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def snippet(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def printed_by_the_snippet(card: ModelCard) -> list:
    printed = []
    exec(snippet(card), {"print": printed.append})
    return printed


@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_and_loss_are_the_model_s(model_type, tmp_path):
    model = model_with_tags(model_type)
    folders = save_tasks(model, tmp_path / "out")
    assert folders == [tmp_path / "out" / "tasks" / name for name in model.tasks]
    labels = {
        "two": [0, 1],
        "three": [2, 0],
        "real": [0.5, -1.0],
        "tags": [[0, 1, 2, 0, 1, 2], [1, 1, 0, 0, -100, -100]],
    }
    for name, folder in zip(model.tasks, folders, strict=True):
        auto = AutoModelForTokenClassification if name == "tags" else AutoModelForSequenceClassification
        plain, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        batch = {**BATCH, "labels": torch.tensor(labels[name])}
        with torch.no_grad():
            theirs, ours = plain.eval()(**batch), model(**batch, task=name)
        close(theirs.logits, ours.logits)
        close(theirs.loss, ours.loss)
        names = model.tasks[name].labels or ("LABEL_0",)
        assert plain.config.id2label == dict(enumerate(names))
        assert plain.config.label2id == {label: i for i, label in enumerate(names)}


def test_its_card_has_the_task_s_metrics_and_a_snippet_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_with_tags("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    both = {"three": {"accuracy": 61.25}, "two": {"accuracy": 99.0}}
    results = {"sparse": {"tasks": both, "average": 80.1}, "dense": {"tasks": both, "average": 80.1}}
    (tmp_path / "model" / "results.json").write_text(json.dumps(results))
    [folder] = save_tasks(tmp_path / "model", tmp_path / "one", "three")
    card = ModelCard.load(folder / "README.md")
    [metric] = card.data.eval_results
    assert (metric.metric_value, metric.dataset_name) == (61.25, "three") and "99.0" not in card.text
    [answer] = printed_by_the_snippet(card)
    assert re.search(r"'label': '[abc]'", str(answer))
    folders = save_tasks(tmp_path / "model", tmp_path / "all")
    card = ModelCard.load(folders[1] / "README.md")
    assert printed_by_the_snippet(card) == [answer]


def test_the_results_of_another_program_leave_no_folder(tmp_path):
    model_with_tags("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "results.json").write_text('{"sparse": {"two": 1}}')
    with pytest.raises(UserError, match=r"results\.json: not what training writes"):
        save_tasks(tmp_path / "model", tmp_path / "one", "three")
    for form in ("packed", "compact"):
        refused(
            "export", tmp_path / "model", "--format", form, "--output_dir", tmp_path / "one", names=("results.json",)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_pipeline_reads_it_without_the_package(tmp_path):
    model, tokenizer = model_with_tags("bert"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("of all tasks")
    [folder] = save_tasks(tmp_path / "model", tmp_path / "three", "three")
    [tags] = save_tasks(tmp_path / "model", tmp_path / "tags", "tags")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    code = (
        "import json, sys; from transformers import pipeline\n"
        f"whole = pipeline('text-classification', {str(folder)!r}, top_k=None)('w1 w2 w3')[0]\n"
        f"each = pipeline('token-classification', {str(tags)!r})('w1 w2')\n"
        f"exec({snippet(ModelCard.load(folder / 'README.md'))!r}, {{'print': str}})\n"
        "assert not any(name.startswith('hf_disparse') for name in sys.modules)\n"
        "print(json.dumps([{x['label']: x['score'] for x in whole}, [x['entity'] for x in each]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    scores, entities = json.loads(done.stdout)
    with torch.no_grad():
        expected = model(**tokenizer("w1 w2 w3", return_tensors="pt"), task="three").logits.softmax(-1)[0]
        tagged = model(**tokenizer("w1 w2", return_tensors="pt"), task="tags").logits[0, 1:-1].argmax(-1)
    assert scores == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)), abs=1e-5)
    assert set(entities) <= {"O", "X", "Y"} and len(entities) <= len(tagged)


def test_skipped_layers_and_even_neurons_are_plain_too(tmp_path):
    model = model_of("bert")
    prune_parts(model, ["neuron"], even=True)
    model.skip_layers([1])
    plain = task_model(model, "two").eval()
    assert plain.config.num_hidden_layers == 2 and plain.config.intermediate_size == 32
    with torch.no_grad():
        close(plain(**BATCH).logits, model(**BATCH, task="two").logits)
    assert model.config.skipped_layers == [1]
    compact(model)
    small = task_model(model, "two").eval()
    assert small.config.num_hidden_layers == 2 and small.config.intermediate_size == 16
    with torch.no_grad():
        close(small(**BATCH).logits, plain(**BATCH).logits)


def test_skipped_layers_and_heads_that_are_masked(tmp_path):
    model = model_of("bert")
    prune_parts(model, ["head"])
    model.skip_layers([1])
    plain = task_model(model, "two").eval()
    with torch.no_grad():
        close(plain(**BATCH).logits, model(**BATCH, task="two").logits)


def test_each_weight_keeps_its_precision(tmp_path):
    model = tiny_model()
    model.encoder.bfloat16()
    plain = task_model(model, "two")
    assert plain.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    assert plain.classifier.weight.dtype == torch.float32


def test_a_task_can_be_packed(tmp_path):
    model = tiny_model()
    prune_parts(model)
    save_tasks(model, tmp_path / "task", "two")
    assert save_packed(tmp_path / "task", tmp_path / "packed")["matrices"] > 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        close(plain(**BATCH).logits, model.eval()(**BATCH, task="two").logits)


def test_half_precision(tmp_path):
    [folder] = save_tasks(tiny_model(), tmp_path / "task", "two", torch.bfloat16)
    assert AutoModelForSequenceClassification.from_pretrained(folder).dtype == torch.bfloat16


def test_what_plain_transformers_cannot_read_is_refused(tmp_path):
    model = model_of("bert")
    prune_parts(model)
    compact(model)
    with pytest.raises(
        UserError, match="plain transformers cannot read a compact encoder whose layers differ in shape"
    ):
        task_model(model, "two")
    with pytest.raises(UserError, match="task: the model has no task 'four'; it has two, three, real"):
        task_model(tiny_model(), "four")
    save_tasks(tiny_model(), tmp_path / "task", "two")
    with pytest.raises(UserError, match="which is one task already"):
        save_tasks(tmp_path / "task", tmp_path / "again", "two")


def test_the_command_speaks_of_its_own_options(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    words = ("export", tmp_path / "model", "--output_dir", tmp_path / "out")
    refused(*words, "--format", "task", "--task", "four", names=("error: --task: the model has no task 'four'",))
