"""The command line: commands, tables, exit statuses."""
