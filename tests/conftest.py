"""Settings of all tests."""

import gc
import os

from hypothesis import settings

# On CI the same examples every time; elsewhere new ones, to find new faults.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_finish():
    """Accelerate collects garbage at every training: half a second each, unless what was imported is left out."""
    gc.collect()
    gc.freeze()
