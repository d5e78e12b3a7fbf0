"""The mathematics of the pruning methods, one file each: pure functions on tensors. Layer 4; knows torch only."""
