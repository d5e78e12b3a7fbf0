"""The front door: light commands load no heavy library, and `import hf_disparse` is all that transformers needs to know our models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_disparse
from tests.helpers.commands import write_recipe

ROOT = Path(__file__).parents[1]
ARTEFACTS = ROOT / "tests" / "artefacts"
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "scipy",
    "sklearn",
    "accelerate",
    "peft",
    "matplotlib",
    "pandas",
)
RECIPE = {
    "model": {"encoder": "x"},
    "tasks": {"a": {"data": "a.csv", "columns": ["text"], "labels": ["no", "yes"]}},
    "output_dir": "out",
}
COMMANDS = ("train", "evaluate", "compare", "analyze", "export", "push")


def fresh(script: str, **environment: str) -> dict:
    """Runs a script in a process of its own, which has to end with a call of `show(...)`; returns what it showed."""
    head = "import json, sys\ndef show(**values): print('\\n' + json.dumps(values))\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_light_commands_load_nothing_heavy(tmp_path):
    """Help, version, and mistakes in the name of a command, an option or the key of a recipe, all in one process."""
    mistakes = {
        "prunning": {**RECIPE, "prunning": {}},
        "sparsty": {**RECIPE, "pruning": {"sparsty": 0.5}},
        "learning_rat": {**RECIPE, "training": {"learning_rat": 1}},
        "max_step": {**RECIPE, "recovery": {"max_step": 1}},
        "colums": {**RECIPE, "tasks": {"a": {"data": "a.csv", "colums": ["text"]}}},
        "max_lenght": {**RECIPE, "model": {"encoder": "x", "max_lenght": 1}},
    }
    recipes = {key: write_recipe(tmp_path, values, f"{key}.yaml") for key, values in mistakes.items()}
    good = write_recipe(tmp_path, RECIPE, "good.yaml")
    light = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    wrong = {
        "tran": ["tran"],
        "--sparsity": ["train", good, "--sparsity", "0.5"],
        "quorm": ["train", good, "--set", "pruning.quorm=2"],
    }
    wrong |= {key: [command, path] for key, path in recipes.items() for command in ("train", "compare")}
    shown = fresh(
        "import contextlib, io\n"
        "from hf_disparse.cli.main import main\n"
        f"commands, heavy = json.loads({json.dumps([light, list(wrong.values())])!r}), {HEAVY}\n"
        "found = []\n"
        "for words in commands[0] + commands[1]:\n"
        "    sys.argv = ['hf-disparse', *words]\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: main()\n"
        "        except SystemExit as end: status = end.code or 0\n"
        "    found.append((status, out.getvalue(), said.getvalue(), [name for name in heavy if name in sys.modules]))\n"
        "show(found=found)\n"
    )["found"]
    for words, (status, out, _, heavy) in zip(light, shown, strict=False):
        assert (status, heavy) == (0, []) and out, words
    for word, (status, _, said, heavy) in zip(wrong, shown[len(light) :], strict=True):
        assert (status, heavy) == (2, []) and word in said, said


@pytest.mark.parametrize("first", ["hf_disparse", pytest.param("transformers", marks=pytest.mark.slow)])
def test_auto_classes_know_our_models_in_whatever_order_they_are_imported(first):
    second = {"hf_disparse": "from transformers import AutoConfig, AutoModel", "transformers": "import hf_disparse"}[
        first
    ]
    before = {"hf_disparse": "import hf_disparse", "transformers": "from transformers import AutoConfig, AutoModel"}[
        first
    ]
    shown = fresh(
        f"{before}\nheavy = [name for name in {HEAVY} if name in sys.modules]\n{second}\n"
        f"names = ['plain', 'packed', 'compact', 'rank', 'unshared', 'adapters']\n"
        f"config = type(AutoConfig.from_pretrained({str(ARTEFACTS / 'plain')!r})).__name__\n"
        f"models = [type(AutoModel.from_pretrained({str(ARTEFACTS)!r} + '/' + name)).__name__ for name in names]\n"
        "unused = [name for name in ('datasets', 'evaluate', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules]\n"
        "show(config=config, models=models, heavy=heavy, unused=unused)"
    )
    assert shown["config"] == "MultitaskConfig" and shown["models"] == ["MultitaskModel"] * 6
    assert first == "transformers" or shown["heavy"] == []
    assert "evaluate" not in shown["unused"] and "matplotlib" not in shown["unused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import hf_disparse.model.structure",
        "import hf_disparse.export.packed",
        "import hf_disparse.methods",
        "import hf_disparse.tasks.batches",
        "import peft",
        "from transformers import PrinterCallback",
        "from transformers import Trainer, pipeline",
        "import transformers.quantizers.auto",
        "import transformers.models.bert.modeling_bert",
        "from hf_disparse import speed_up",
    ],
)
def test_whatever_loads_transformers_first_our_classes_register_once_it_is_whole(first):
    """Modules of transformers import one another in circles: ours must meet none that is half loaded, nor the other way round."""
    shown = fresh(
        f"import hf_disparse\n{first}\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "show(known='hf_disparse_multitask' in CONFIG_MAPPING, reads='hf_disparse.export.loading' in sys.modules)"
    )
    assert shown == {"known": True, "reads": True}


def test_every_public_name_is_listed_loads_and_keeps_its_name():
    assert set(hf_disparse.__all__) <= set(dir(hf_disparse))
    for name in hf_disparse.__all__:
        assert getattr(hf_disparse, name).__name__ == name
    with pytest.raises(AttributeError, match="prune_all"):
        hf_disparse.prune_all  # noqa: B018
