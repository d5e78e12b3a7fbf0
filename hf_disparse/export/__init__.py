"""What leaves the project: checkpoints that are small or fast, and how transformers reads them."""

import lazy_loader

import hf_disparse.model  # noqa: F401, as `hf_disparse/__init__.py` imports `loading` as soon as transformers has loaded

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "card": ["write_card"],
        "compact": ["compact", "save_compact"],
        "folder": ["is_multitask"],
        "hub": ["push"],
        "packed": ["save_packed"],
        "task": ["save_tasks", "task_model"],
        "to_onnx": ["save_onnx"],
    },
)
