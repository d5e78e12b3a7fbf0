"""Prune one shared Transformer encoder with several task heads: every task judges, and what all can spare goes.

Names load when they are used (`__init__.pyi` lists them), so that importing this costs next to nothing. Once transformers loads its
Auto classes, `MultitaskModel` and the form of packed and compact checkpoints are registered with them.
"""

import sys
from importlib import import_module

import lazy_loader
from wrapt import register_post_import_hook

from hf_disparse.config.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Our classes register themselves when they are imported, once these modules of transformers have loaded, no matter who loads them.
# Importing our classes here would cost seconds, which `hf-disparse --help` does not need.
_REGISTERS_WITH = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.quantizers",
)
_loaded = set()


def _register(module) -> None:
    """Imports our classes unless one of these modules, which import one another, is still half loaded: then its turn comes."""
    _loaded.add(module.__name__)
    if all(name in _loaded for name in _REGISTERS_WITH if name in sys.modules):
        import_module("hf_disparse.model.multitask")


for _name in _REGISTERS_WITH:
    register_post_import_hook(_register, _name)
register_post_import_hook(lambda _: import_module("hf_disparse.export.loading"), "hf_disparse.model.multitask")
