"""The wheel builds, installs and runs without this checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_installs_and_runs_without_the_checkout(tmp_path):
    def run(*command: str, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert (site / "hf_disparse" / "py.typed").is_file()
    code = ({path.name for path in (root / "hf_disparse" / "fast").glob("*.[ch]")} for root in (ROOT, site))
    assert next(code) == next(code)
    where = run(sys.executable, "-c", "import hf_disparse; print(hf_disparse.__file__)", PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    shown = run(sys.executable, str(site / "bin" / "hf-disparse"), "train", "--help", PYTHONPATH=str(site))
    assert "recipes/quickstart.yaml" in shown
