"""One encoder, many heads, and their shapes."""
