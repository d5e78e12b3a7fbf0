"""The commands, their tables and exit statuses."""
