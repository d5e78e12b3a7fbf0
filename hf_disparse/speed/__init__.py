"""A finished model made faster: what its parts are worth to each task, what they cost in time, and which of them stay."""
