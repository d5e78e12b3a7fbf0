"""From gradients to masks: pure functions on tensors."""
