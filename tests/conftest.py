"""Settings of all tests."""

import os

from hypothesis import settings

# On CI the same examples every time; elsewhere new ones, to find new faults.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
