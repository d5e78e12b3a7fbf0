"""Every piece of Python in the how-to runs, one after another, on tiny runs of the names that it uses."""

import gzip
import json
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from transformers import BertModel

from hf_disparse import PruningConfig, TaskConfig
from hf_disparse.tasks.batches import MultitaskCollator, TaskDataset
from tests.helpers.commands import hf_disparse, write_recipe
from tests.helpers.docs import blocks
from tests.helpers.tiny import tiny_bert_config, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import arguments, multitask_trainer, plain_model

pytest.importorskip("peft")
BLOCKS = blocks("howto.md", "python")
RUNS = {"quickstart": ["topic", "headline", "sentiment"], "seven": ["rte", "mrpc", "cola", "sst2"]}
NEW = TaskConfig(name="new", columns="text", labels=["no", "yes"])


def write_runs() -> None:
    """The runs that the how-to speaks of, with an encoder of six layers."""
    config = tiny_bert_config()
    config.num_hidden_layers = 6
    BertModel(config).save_pretrained("encoder")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("encoder")
    Path("rows.csv").write_text("text,pair,label\n" + "".join(f"w{i},w{i % 7},{i % 2}\n" for i in range(40)))
    for run, names in RUNS.items():
        task = {"data": "rows.csv", "labels": ["no", "yes"], "validation_fraction": 0.25}
        columns = {name: ["text"] if name == "sentiment" else ["text", "pair"] for name in names}
        recipe = {
            "model": {"encoder": "encoder", "max_length": 16},
            "tasks": {name: {**task, "columns": columns[name], "label_column": "label"} for name in names},
            "pruning": {"sparsity": 0.8, "score_batches": 2, "keep_scores": True},
            "training": {"max_steps": 4, "use_cpu": True, "task_sampling": "round_robin", "learning_rate": 1e-3},
            "output_dir": f"runs/{run}",
        }
        status, _, err = hf_disparse("train", write_recipe(Path(), recipe), "--no-analysis")
        assert status == 0, err
    status, _, err = hf_disparse("export", "runs/quickstart", "--output_dir", "quickstart-packed")
    assert status == 0, err
    with gzip.open("reviews-0.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"w{i} w{i + 1}", "stars": 1 + i % 5}) + "\n" for i in range(30))


def given() -> dict:
    """What the readers of the page have of their own."""
    multitask_trainer("resumed", max_steps=4, save_strategy="steps", save_steps=2).train()
    rows, tokenizer = tokenized_rows(NEW, 40), tiny_tokenizer()
    batches = list(DataLoader(TaskDataset({"new": rows}), 8, collate_fn=MultitaskCollator(tokenizer, {"new": NEW})))
    plain = [{key: value for key, value in batch.items() if key != "task"} for batch in batches]
    return {
        "model": plain_model(),
        "args": arguments("out", max_steps=4, task_sampling="round_robin"),
        "config": PruningConfig(sparsity=0.5),
        "tokenizer": tokenizer,
        "new_task": NEW,
        "rows": rows,
        "batches": batches,
        "loader": plain,
        "batches_a": plain,
        "batches_b": plain,
        "train": dict.fromkeys(RUNS["quickstart"], rows),
        "six": dict.fromkeys(RUNS["seven"][1:], rows),
        "trainer": multitask_trainer("resumed", max_steps=8),  # last: others' arguments take the process from it
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Already found a `peft_config`")
def test_the_python_of_the_how_to_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_runs()
    names = given()
    for number, block in enumerate(BLOCKS):
        if "unshare(" in block:
            names["train"] = dict.fromkeys(RUNS["seven"], names["rows"])
        if "streaming=True" in block:
            names["model"] = tiny_model([TaskConfig(name="stars", columns="text", labels=list("12345"))])
        block = block.replace("start_step=100", "start_step=2")  # of four steps
        exec(compile(block, f"docs/howto.md, piece {number}", "exec"), names)
    assert set(names["similarity"]) == set(RUNS["seven"])
