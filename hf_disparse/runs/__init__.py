"""One recipe, one folder."""
