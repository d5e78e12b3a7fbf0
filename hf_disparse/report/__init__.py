"""Figures and sentences from the JSON of an analysis or a comparison."""
