"""From YAML to a checked `Recipe`."""
