"""The docs name what there is: every public name, dependency, test; the README's code runs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import hf_disparse
from tests.helpers.docs import DOCS, ROOT, blocks
from tests.helpers.tiny import needs_demo


@pytest.mark.parametrize("name", hf_disparse.__all__)
def test_every_public_name_is_in_the_reference_and_documented(name):
    assert f"`{name}`" in DOCS["reference.md"] or f"`{name}(" in DOCS["reference.md"]
    assert getattr(hf_disparse, name).__doc__


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name == "hf_disparse" or f"`{name}`" in DOCS["reference.md"], name


def test_papers_name_functions_and_tests_that_exist():
    rows = [line for line in DOCS["papers.md"].splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) >= 10
    for row in rows:
        function, test = row.replace("\\|", "").strip("|").split("|")[2:4]
        for module, name in re.findall(r"`([\w.]+)\.(\w+)`", function):
            assert callable(getattr(importlib.import_module(f"hf_disparse.{module}"), name))
        tests = re.findall(r"`(\w+)\.(\w+)`", test)
        assert tests, row
        for module, name in tests:
            (path,) = Path(__file__).parent.rglob(f"{module}.py")
            place = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert callable(getattr(importlib.import_module(place), name))


def test_the_walkthrough_names_functions_that_exist():
    names = re.findall(r"`(\w+(?:\.\w+)+)`", DOCS["walkthrough.md"])
    names = [
        name for name in names if (ROOT / "hf_disparse" / name.split(".")[0]).exists() or name.startswith("files.")
    ]
    names = [name for name in names if not name.endswith(".json")]
    assert len(names) > 30
    for name in names:
        parts = name.split(".")
        depth = 1 if parts[0] == "files" else 2
        place = importlib.import_module(".".join(["hf_disparse", *parts[:depth]]))
        for part in parts[depth:]:
            place = getattr(place, part)
        assert callable(place), name


def test_links_between_pages_lead_somewhere():
    for page, text in DOCS.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{page}: {target}"


def test_yaml_of_the_how_to_is_a_recipe_s():
    import yaml

    from hf_disparse.recipes.recipe import SECTIONS, parse_recipe

    values = {}
    for block in blocks("howto.md", "yaml"):
        values |= yaml.safe_load(block)
    assert set(values) <= set(SECTIONS)
    values["training"]["learning_rate"] = 1e-4  # PyYAML's own loader reads 1e-4 as text
    values["recovery"]["learning_rate"] = 5e-5
    parse_recipe(
        {"model": {"encoder": "x"}, "output_dir": "y", **values, "training": values["training"] | {"use_cpu": True}}
    )


def test_the_page_on_analysis_runs_and_finds_what_it_says(capsys):
    (script,) = blocks("analysis.md", "python")
    exec(script, {})
    assert capsys.readouterr().out.startswith("3\n{'layer': 0")
    names = re.findall(r"`(\w+)\(", "".join(line for line in DOCS["analysis.md"].splitlines() if line.startswith("|")))
    assert {"agreement", "watershed", "keepers", "footprint"} <= set(names)
    assert all(callable(getattr(importlib.import_module("hf_disparse.analysis"), name)) for name in names)


def test_every_name_of_the_analysis_is_in_the_reference_and_documented():
    module = importlib.import_module("hf_disparse.analysis")
    for name in module.__all__:
        assert f"`{name}`" in DOCS["reference.md"] and getattr(module, name).__doc__, name


@pytest.mark.slow
@needs_demo
def test_the_readme_s_script_runs_as_it_stands(tmp_path):
    script = next(block for block in blocks("README.md", "python") if "DisparseTrainer(" in block)
    shorter = script.replace("max_steps=200", "max_steps=8").replace(
        "start_step=60, end_step=140, update_every=20, score_batches=16", "end_step=4, update_every=2, score_batches=2"
    )
    assert shorter != script
    done = subprocess.run([sys.executable, "-c", shorter], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eval_average" in done.stdout
    model = hf_disparse.MultitaskModel.from_pretrained(tmp_path / "runs" / "script")
    report = hf_disparse.sparsity_report(model, model.encoder, hf_disparse.prunable_parameters(model))
    assert report["prunable"] == pytest.approx(0.8, abs=1e-6)
