"""The recipes that come with the project: complete, headed, and of data that they fit."""

import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hf_disparse.recipes.recipe import read_recipe
from hf_disparse.runs import train as run
from hf_disparse.tasks.glue import GLUE
from tests.helpers.commands import write_csv, write_encoder
from tests.helpers.glue import GLUE as GLUE_DATA
from tests.helpers.glue import needs_glue
from tests.helpers.tiny import WORDS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ON_CPU = "training.use_cpu=true"  # where a recipe asks for a GPU's bf16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_header_says_how_where_how_long_and_what_to_expect(path):
    recipe = read_recipe(path, [ON_CPU])
    assert recipe.output_dir == f"runs/{path.stem}"
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    for word in (f"hf-disparse train recipes/{path.name}", "Hardware:", "minutes", "Expect:"):
        assert word.lower() in header.lower(), word


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("glue_")], ids=lambda path: path.stem)
def test_a_glue_recipe_is_what_its_name_says(path):
    recipe = read_recipe(path, [ON_CPU])
    assert recipe.pruning.sparsity == int(path.stem[-2:]) / 100
    assert set(recipe.tasks) <= set(GLUE)
    assert {data.data for _, data in recipe.tasks.values()} == {"nyu-mll/glue"}


def test_the_minilm_recipes_differ_in_sparsity_and_recovery_only():
    values = [read_recipe(p).values for p in sorted(RECIPES) if p.stem.startswith("glue_minilm")]
    assert [one["pruning"].pop("sparsity") for one in values] == [0.5, 0.7, 0.8, 0.9]
    rates = [one["recovery"].pop("learning_rate") for one in values]
    assert rates == sorted(rates)  # the more is broken, the further weights have to go
    for one in values:
        one["recovery"].pop("distillation", None)
        one["pruning"].pop("reconstruct", None)
        assert {**one, "output_dir": ""} == {**values[0], "output_dir": ""}


@needs_glue
def test_a_glue_recipe_takes_a_local_encoder_and_local_data(tmp_path):
    overrides = [
        f"tasks.*.data={GLUE_DATA}",
        "tasks.*.max_train_rows=50",
        "model.max_length=32",
        f"model.encoder={write_encoder(tmp_path)}",
    ]
    plan = run.plan(read_recipe(ROOT / "recipes" / "glue_minilm_90.yaml", overrides, str(tmp_path / "run")))
    # The official numbers of validation examples, but for mrpc, which the local copy splits anew.
    assert plan["examples"]["validation"] == {"rte": 277, "mrpc": 500, "stsb": 1500, "cola": 1043, "sst2": 872}


def test_the_template_for_own_data_reads_files_of_the_kinds_it_names(tmp_path):
    draw = random.Random(0)
    rows = [[" ".join(draw.choices(WORDS, k=4)), " ".join(draw.choices(WORDS, k=4)), i % 2] for i in range(40)]
    questions = [dict(zip(("question1", "question2", "is_duplicate"), row, strict=True)) for row in rows]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    pairs = [dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    write_csv(tmp_path / "reviews.csv", ["negative", "positive"], rows=50, seed=0)
    recipe = ROOT / "recipes" / "own_data.yaml"
    files = {name: Path(data.data).name for name, (_, data) in read_recipe(recipe).tasks.items()}
    overrides = [f"tasks.{name}.data={tmp_path / file}" for name, file in files.items()]
    plan = run.plan(read_recipe(recipe, [*overrides, f"model.encoder={write_encoder(tmp_path / 'e')}"], "unused"))
    assert plan["examples"]["train"] == {"sentiment": 45, "duplicates": 36, "similarity": 36}
    assert plan["examples"]["validation"] == {"sentiment": 5, "duplicates": 4, "similarity": 4}
