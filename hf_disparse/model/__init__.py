"""One encoder, many heads, and their shapes."""

# First and whole: `hf_disparse/__init__.py` imports modules of this wing as soon as it has loaded.
import transformers.modeling_utils  # noqa: F401
