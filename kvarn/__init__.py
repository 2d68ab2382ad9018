"""KVarN: a quantised KV cache for LLM serving engines. Importing it loads neither torch nor an engine."""

from kvarn.presets import PRESETS, Preset, get_preset

__all__ = ["PRESETS", "Preset", "__version__", "get_preset"]
__version__ = "0.1.0"
