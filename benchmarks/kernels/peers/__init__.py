"""Peers: other implementations of decode attention, imported lazily, on the same shapes under the same rules."""
