"""The command `kvarn`."""
