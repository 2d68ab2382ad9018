"""What a name in a result file stands for, told without torch."""

VARIANT_MARK = ":"


def is_variant_name(name: str) -> bool:
    """Tell whether a name is one of a variant of KVarN's quantiser, valid or not."""
    return VARIANT_MARK in name


def family(name: str) -> str:
    """Return what a method is called at any width: its name before the widths."""
    return name.partition("-k")[0]
