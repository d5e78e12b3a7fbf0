"""Figures and sentences from JSON."""
