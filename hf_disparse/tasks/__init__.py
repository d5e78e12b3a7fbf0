"""Tasks: from files to batches and metrics."""
