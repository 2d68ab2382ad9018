"""How much each layer minds being quantised, and the choice, layer by layer, that minds least within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvarn.evaluation.method_cache import MethodCache
from kvarn.evaluation.methods import UNCHANGED, Method
from kvarn.evaluation.run import Evaluation


def sensitivity(evaluation: Evaluation, method: Method, layer: int, layers: int) -> float:
    """Return the mean KL of a text when the tiles of one layer alone are quantised.

    Args:
        evaluation: model and text.
        method: what happens to that layer's tiles.
        layer: which; layers: of the model.
    """
    chosen = [method if i == layer else UNCHANGED for i in range(layers)]
    return evaluation.compare(MethodCache(chosen), f"{method.name} in layer {layer}").kl_mean


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[int], budget: int) -> list[int]:
    """Choose one option for every layer, with the least sum of costs within a budget.

    Args:
        costs: [layers][options].
        sizes: [options], of an option.
        budget: the most that all layers' sizes may add up to.

    Returns:
        [layers], index of the option.

    Raises:
        ValueError: even the smallest options don't fit.
    """
    # best[size]: least cost of the layers so far at that size, and their choices
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in costs:
        longer: dict[int, tuple[float, list[int]]] = {}
        for size, (cost, choices) in best.items():
            for option, (more, added) in enumerate(zip(layer, sizes, strict=True)):
                total = size + added
                if total <= budget and cost + more < longer.get(total, (math.inf, []))[0]:
                    longer[total] = (cost + more, [*choices, option])
        best = longer
    if not best:
        raise ValueError(f"{len(costs)} layers of at least {min(sizes)} do not fit in {budget}.")
    return min(best.values())[1]
