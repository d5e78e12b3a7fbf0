"""The quickstart's data: no leak between splits, negatives of the same topic, the same rows every time."""

from collections import Counter
from fractions import Fraction
from functools import cache

import pytest

from hf_disparse.config import DataConfig, TaskConfig, UserError
from hf_disparse.tasks.data import load_task
from hf_disparse.tasks.demo import TOPICS, load
from tests.helpers.tiny import needs_demo


@cache
def splits(name):
    """Split -> rows of a demo task."""
    return {split: list(rows) for split, rows in load(name, "data").items()}


@needs_demo
@pytest.mark.parametrize("name", ["topic", "sentiment"])
def test_a_fifth_is_held_out_and_no_text_stands_in_both_splits(name):
    parts, columns = splits(name), {"topic": ["headline", "lead"], "sentiment": ["text"]}[name]
    sizes = {split: len(rows) for split, rows in parts.items()}
    assert sizes["validation"] == round(Fraction(1, 5) * sum(sizes.values()))
    for column in columns:
        train, validation = ([row[column] for row in parts[split]] for split in ("train", "validation"))
        assert not set(train) & set(validation)
        assert all(isinstance(text, str) and text.strip() for text in train + validation)


@needs_demo
def test_topics_are_balanced_alike_in_both_splits():
    # The collection has 2,225 articles, 386 to 511 per topic; some of them twice.
    parts = splits("topic")
    counts = {split: Counter(row["topic"] for row in rows) for split, rows in parts.items()}
    assert 1900 < sum(len(rows) for rows in parts.values()) <= 2225
    for topic in TOPICS:
        shares = [counts[split][topic] / len(parts[split]) for split in ("train", "validation")]
        assert all(0.14 < share < 0.27 for share in shares) and abs(shares[0] - shares[1]) < 0.06


@needs_demo
def test_headline_negatives_come_from_another_article_of_the_same_topic_and_split():
    for split, articles in splits("topic").items():
        topic_of = {a["headline"]: a["topic"] for a in articles}
        own = {a["lead"]: a["headline"] for a in articles}
        rows = splits("headline")[split]
        assert Counter(row["label"] for row in rows) == {"match": len(articles), "other": len(articles)}
        assert Counter(row["lead"] for row in rows) == dict.fromkeys(own, 2)
        for row in rows:
            assert (row["headline"] == own[row["lead"]]) == (row["label"] == "match")
            assert topic_of[row["headline"]] == topic_of[own[row["lead"]]]


@needs_demo
def test_no_headline_or_lead_leaks_between_the_splits_of_headline():
    parts = splits("headline")
    for column in ("headline", "lead"):
        assert not {r[column] for r in parts["train"]} & {r[column] for r in parts["validation"]}


@needs_demo
@pytest.mark.parametrize("name", ["topic", "headline", "sentiment"])
def test_demo_task_is_the_same_every_time(name):
    assert {split: list(rows) for split, rows in load(name, "data").items()} == splits(name)


@needs_demo
def test_sentiment_has_both_labels_of_every_text_once():
    rows = [row for part in splits("sentiment").values() for row in part]
    assert len({row["text"] for row in rows}) == len(rows)
    assert min(Counter(row["sentiment"] for row in rows).values()) > 0.05 * len(rows)


@needs_demo
def test_demo_task_loads_through_its_config_with_a_cap():
    task = TaskConfig(name="topic", columns=("headline", "lead"), label_column="topic", labels=TOPICS)
    train, validation = load_task(task, DataConfig(data="demo:topic", max_validation_rows=10))
    assert train["lead"][:] == [row["lead"] for row in splits("topic")["train"]]
    assert len(validation) == 10


def test_wrong_demo_task_names_the_closest():
    task = TaskConfig(name="t", columns="text", labels=("a", "b"))
    with pytest.raises(UserError, match=r"^tasks\.t\.data: there is no demo task 'topics'; did you mean 'topic'\?$"):
        load_task(task, DataConfig(data="demo:topics"))
    with pytest.raises(UserError, match=r"^tasks\.t\.subset: must not be set with demo:topic, got 'x'$"):
        load_task(task, DataConfig(data="demo:topic", subset="x"))
