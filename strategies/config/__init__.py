"""The config of one worker's training. Loads without torch.

adapter.py, model.py, optimizer.py, trainer.py  keys by subject; those of a method are in its strategy's file
schema.py   all of them in one class, `StrategyConfig`, and keys of registered strategies
rules.py    relations between keys
parsing.py  `as_config`: validates a mapping
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.config.model import SpecialTokens
    from strategies.config.optimizer import LrGroup
    from strategies.config.parsing import as_config
    from strategies.config.schema import StrategyConfig, with_strategy_keys
    from strategies.keys import Keys, key
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.config.model": "SpecialTokens",
            "strategies.config.optimizer": "LrGroup",
            "strategies.config.parsing": "as_config",
            "strategies.config.schema": "StrategyConfig with_strategy_keys",
            "strategies.keys": "Keys key",
        },
    )

__all__ = ["Keys", "LrGroup", "SpecialTokens", "StrategyConfig", "as_config", "key", "with_strategy_keys"]
