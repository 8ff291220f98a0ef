"""How much memory one training worker will need.

worst_case.py   the largest forward that a config allows
formula.py      a closed formula of its peak, computed without loading weights; what each optimizer keeps per weight
activations.py  its term for activations and logits
measure.py      the same worst case trained for two steps in a fresh process
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.memory.formula import ITEMS, LAYERS, MemoryEstimate, estimate
    from strategies.memory.measure import Measured, measure_peak
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.memory.formula": "ITEMS LAYERS MemoryEstimate estimate",
            "strategies.memory.measure": "Measured measure_peak",
        },
    )

__all__ = ["ITEMS", "LAYERS", "Measured", "MemoryEstimate", "estimate", "measure_peak"]
