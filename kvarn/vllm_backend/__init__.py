"""The vLLM adapter: from vLLM's plugin to the core."""
