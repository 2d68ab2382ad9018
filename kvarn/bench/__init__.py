"""Benchmarks of served engines: start a server, drive it with the engine's own client, check, write rows."""
