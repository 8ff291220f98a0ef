"""What is optimised: strategies, builder, trainer, mixins. Imports neither ray nor pipeline nor cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.base import PairStrategy, Strategy
    from strategies.builder import HFRLTrainerBuilder
    from strategies.dpo import DPOStrategy
    from strategies.grpo import GRPOStrategy
    from strategies.ipo import IPOStrategy
    from strategies.keys import Keys, key
    from strategies.kto import KTOStrategy
    from strategies.orpo import ORPOStrategy
    from strategies.plugins import load_plugins
    from strategies.registering import register_callback, register_loss, register_strategy
    from strategies.simpo import SimPOStrategy
    from strategies.trainers.grpo import AxolotlGRPOTrainer
    from strategies.trainers.kto import AxolotlKTOTrainer
    from strategies.trainers.pair import AxolotlDPOTrainer
    from strategies.training import TrainDatasetMeta, train

__all__ = [
    "AxolotlDPOTrainer",
    "AxolotlGRPOTrainer",
    "AxolotlKTOTrainer",
    "DPOStrategy",
    "GRPOStrategy",
    "HFRLTrainerBuilder",
    "IPOStrategy",
    "KTOStrategy",
    "Keys",
    "ORPOStrategy",
    "PairStrategy",
    "SimPOStrategy",
    "Strategy",
    "TrainDatasetMeta",
    "key",
    "load_plugins",
    "register_callback",
    "register_loss",
    "register_strategy",
    "train",
]

_EXPORTS = {
    "AxolotlDPOTrainer": "strategies.trainers.pair",
    "AxolotlGRPOTrainer": "strategies.trainers.grpo",
    "AxolotlKTOTrainer": "strategies.trainers.kto",
    "DPOStrategy": "strategies.dpo",
    "GRPOStrategy": "strategies.grpo",
    "HFRLTrainerBuilder": "strategies.builder",
    "IPOStrategy": "strategies.ipo",
    "KTOStrategy": "strategies.kto",
    "Keys": "strategies.keys",
    "ORPOStrategy": "strategies.orpo",
    "PairStrategy": "strategies.base",
    "SimPOStrategy": "strategies.simpo",
    "Strategy": "strategies.base",
    "TrainDatasetMeta": "strategies.training",
    "key": "strategies.keys",
    "load_plugins": "strategies.plugins",
    "register_callback": "strategies.registering",
    "register_loss": "strategies.registering",
    "register_strategy": "strategies.registering",
    "train": "strategies.training",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the schema loads without torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
