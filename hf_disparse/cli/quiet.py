"""What is printed by whom: one process of several, and libraries only when something is wrong."""

import os
import sys
import warnings

from wrapt import register_post_import_hook


def rank() -> int:
    """The rank of this process as its launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def quiet() -> None:
    """Lets libraries log errors only, and draw progress bars only on a terminal; warnings take one line.

    Each library is silenced when it loads, so that none has to load for this.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code it came from
    if rank():
        warnings.simplefilter("ignore")
    for name, silence in (
        ("datasets", _silence_datasets),
        ("huggingface_hub", lambda hub: hub.logging.set_verbosity_error()),
        ("transformers", _silence_transformers),
    ):
        register_post_import_hook(silence, name)


def _silence_datasets(datasets) -> None:
    datasets.logging.set_verbosity_error()
    if rank() or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _silence_transformers(transformers) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving weights; training has its own
