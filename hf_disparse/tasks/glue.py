"""The nine GLUE tasks (Wang et al. 2019, arXiv 1804.07461) in the layout of `nyu-mll/glue`, with their official metrics."""

from typing import Any

from hf_disparse.config import UserError, closest

_PAIR = ["sentence1", "sentence2"]
_ENTAILMENT = ["entailment", "not_entailment"]

# name -> the fields of TaskConfig and DataConfig that differ from their defaults
GLUE: dict[str, dict[str, Any]] = {
    "cola": {
        "columns": ["sentence"],
        "labels": ["unacceptable", "acceptable"],
        "metric": ["matthews_correlation"],
    },
    "sst2": {"columns": ["sentence"], "labels": ["negative", "positive"]},
    "mrpc": {"columns": _PAIR, "labels": ["not_equivalent", "equivalent"], "metric": ["accuracy", "f1"]},
    "stsb": {"columns": _PAIR, "problem_type": "regression", "metric": ["pearson", "spearmanr"]},
    "qqp": {
        "columns": ["question1", "question2"],
        "labels": ["not_duplicate", "duplicate"],
        "metric": ["accuracy", "f1"],
    },
    "mnli": {
        "columns": ["premise", "hypothesis"],
        "labels": ["entailment", "neutral", "contradiction"],
        "validation_split": "validation_matched",
    },
    "qnli": {"columns": ["question", "sentence"], "labels": _ENTAILMENT},
    "rte": {"columns": _PAIR, "labels": _ENTAILMENT},
    "wnli": {"columns": _PAIR, "labels": ["not_entailment", "entailment"]},
}


def glue_fields(name: str, where: str) -> dict[str, Any]:
    """Returns the fields of TaskConfig and DataConfig for the GLUE task `name`; an error begins with `where`."""
    if name not in list(GLUE):  # a list, because a value from YAML may not be hashable
        raise UserError(f"{where}: there is no GLUE task {name!r}{closest(name, GLUE)}")
    return {"data": "nyu-mll/glue", "subset": name, **GLUE[name]}
