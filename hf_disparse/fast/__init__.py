"""A finished encoder run at speed: C files, their layout, and for each matrix dense or sparse, as measured."""
