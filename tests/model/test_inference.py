"""`MultitaskPipeline`: what each task alone would answer, from one pass of the encoder."""

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_disparse import MultitaskPipeline, TaskConfig, UserError, save_packed
from tests.helpers.tiny import tiny_bert_config, tiny_model, tiny_tokenizer

TASKS = [
    TaskConfig(name="two", columns="text", labels=["no", "yes"]),
    TaskConfig(name="real", columns="text", problem_type="regression"),
    TaskConfig(name="many", columns="text", labels=["a", "b", "c"], problem_type="multi_label_classification"),
    TaskConfig(name="tags", columns="tokens", labels=["O", "X"], problem_type="token_classification"),
    TaskConfig(name="pair", columns=["one", "other"], labels=["same", "other"]),
]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def pipeline() -> MultitaskPipeline:
    return MultitaskPipeline(tiny_model(TASKS), tiny_tokenizer())


def alone(pipeline, task, *texts) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.model(**pipeline.tokenizer(*texts, return_tensors="pt"), task=task).logits[0]


def check(pipeline, text: str, answers: dict) -> None:
    assert list(answers) == ["two", "real", "many", "tags"]
    scores = alone(pipeline, "two", text).softmax(-1)
    assert answers["two"]["label"] == ["no", "yes"][scores.argmax()]
    assert answers["two"]["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert answers["real"]["score"] == pytest.approx(alone(pipeline, "real", text).item(), abs=1e-5)
    expected = alone(pipeline, "many", text).sigmoid().tolist()
    assert [x["label"] for x in answers["many"]] == ["a", "b", "c"]
    assert [x["score"] for x in answers["many"]] == pytest.approx(expected, abs=1e-5)
    tags = alone(pipeline, "tags", text)[1:-1].softmax(-1)  # without [CLS] and [SEP]
    assert [x["word"] for x in answers["tags"]] == text.split()
    assert [x["label"] for x in answers["tags"]] == [["O", "X"][i] for i in tags.argmax(-1)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_task_answers_as_it_does_alone(pipeline, batch_size):
    answers = pipeline(TEXTS, batch_size=batch_size)
    assert len(answers) == len(TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        check(pipeline, text, answer)


def test_one_text_and_a_pair(pipeline):
    check(pipeline, "w1 w2", pipeline("w1 w2"))
    answers = pipeline(("w1", "w2 w3"))
    assert list(answers) == ["pair"]
    assert answers["pair"]["score"] == pytest.approx(
        alone(pipeline, "pair", "w1", "w2 w3").softmax(-1).max().item(), abs=1e-5
    )
    assert [list(a) for a in pipeline([("w1", "w2"), ("w3", "w4 w5")], batch_size=2)] == [["pair"], ["pair"]]


def test_some_tasks(pipeline):
    assert list(pipeline("w1", tasks=["real"])) == list(pipeline("w1", tasks="real")) == ["real"]
    some = MultitaskPipeline(pipeline.model, pipeline.tokenizer, tasks=["two", "real"])
    assert list(some("w1")) == ["two", "real"] and list(some("w1", tasks=["many"])) == ["many"]


def test_a_text_that_is_longer_than_the_encoder_has_positions_is_cut(pipeline):
    positions = pipeline.model.config.encoder_config.max_position_embeddings
    words = ["w1", "w2"] * positions
    check(pipeline, " ".join(words[: positions - 4]), pipeline(" ".join(words)))  # [CLS], [SEP], and two to spare


def test_the_encoder_runs_once(pipeline):
    calls = []
    handle = pipeline.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    pipeline(TEXTS, batch_size=3)
    handle.remove()
    assert len(calls) == 1


def test_from_a_packed_folder(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path / "model")
    pipeline.tokenizer.save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    again = MultitaskPipeline.from_pretrained(tmp_path / "packed")
    check(again, TEXTS[0], again(TEXTS[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p("w1", tasks=["none"]), "the model has no task 'none'; it has two, real, many, tags, pair"),
        (lambda p: p("w1", tasks=["pair"]), "inputs: task 'pair' does not take one text"),
        (lambda p: p("w1", tasks=[]), "tasks: must not be empty; choose from two, real, many, tags, pair"),
        (lambda p: p(("w1", "w2"), tasks=["two"]), "inputs: task 'two' does not take a pair of texts"),
        (lambda p: p([("w1", "w2", "w3")]), "expected a text or a pair of texts"),
        (lambda p: p([1]), "expected a text or a pair of texts"),
        (lambda p: MultitaskPipeline(p.model), "the model's tokenizer is required"),
        (
            lambda p: MultitaskPipeline(BertForSequenceClassification(tiny_bert_config()), p.tokenizer),
            "expected a MultitaskModel, got a BertForSequenceClassification",
        ),
    ],
)
def test_what_cannot_be_answered(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        call(pipeline)
