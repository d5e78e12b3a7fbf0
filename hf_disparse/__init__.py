"""Prune one shared Transformer encoder with several task heads: every task judges, and what all can spare goes.

Names load when they are used (`__init__.pyi` lists them), so that importing this costs next to nothing. Once transformers loads its
Auto classes, `MultitaskModel` and the form of packed and compact checkpoints are registered with them.
"""

from importlib import import_module

import lazy_loader
from wrapt import register_post_import_hook

from hf_disparse.config.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# What is imported once a module of transformers has loaded, no matter who loads it: ours register themselves with transformers there.
# Importing them here would cost seconds, which `hf-disparse --help` does not need.
_IMPORTED_AFTER = {
    "transformers.models.auto.configuration_auto": ("transformers.modeling_utils",),  # the Auto classes load without it
    "transformers.modeling_utils": ("hf_disparse.model.multitask", "hf_disparse.export.loading"),
}


def _import_after(module) -> None:
    for name in _IMPORTED_AFTER[module.__name__]:
        import_module(name)


for _name in _IMPORTED_AFTER:
    register_post_import_hook(_import_after, _name)
