"""Measurements of planning and scheduling, which need no GPU."""
