"""KVarN inside SGLang. Importing it loads neither torch nor SGLang."""
