"""Settings of all tests."""

import gc
import os

import pytest
from hypothesis import settings

if os.environ.get("PYTEST_XDIST_WORKER"):  # as many processes as cores: a thread each, in children, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# On CI the same examples every time; elsewhere new ones, to find new faults.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def named(config) -> bool:
    """Whether the command line names a single test, as in `pytest tests/test_docs.py::test_links`."""
    return any("::" in argument for argument in config.args)


def pytest_configure(config):
    """A test that is named runs, even a slow one."""
    if named(config) and config.option.markexpr == "not slow":
        config.option.markexpr = ""


def pytest_xdist_auto_num_workers(config):
    """One file runs in this process, so that `print` and debuggers work and no worker has to start."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


def pytest_report_header(config):
    if config.option.markexpr == "not slow":
        return "slow tests are left out: `pytest -m slow` runs them, `pytest -m ''` runs all"


def pytest_collection_finish():
    """Accelerate collects garbage at every training: half a second each, unless what was imported is left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A recipe whose encoder and data are there; tests run it into folders of their own. Some files have another one."""
    from tests.helpers.commands import write_inputs  # not above: torch reads OMP_NUM_THREADS as it is imported

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def recipe(inputs, tmp_path) -> dict:
    return {**inputs, "output_dir": str(tmp_path / "run")}
