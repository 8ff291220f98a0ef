"""Preference optimisation: strategies, builder, trainers, losses. Imports neither ray nor pipeline nor cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.builder import HFRLTrainerBuilder
    from strategies.callbacks import register_callback
    from strategies.keys import Keys, key
    from strategies.losses.table import register_loss
    from strategies.methods.base import PairStrategy, Strategy
    from strategies.methods.dpo import DPOStrategy
    from strategies.methods.grpo import GRPOStrategy
    from strategies.methods.ipo import IPOStrategy
    from strategies.methods.kto import KTOStrategy
    from strategies.methods.orpo import ORPOStrategy
    from strategies.methods.registry import register_strategy
    from strategies.methods.simpo import SimPOStrategy
    from strategies.plugins import load_plugins
    from strategies.trainers.grpo import AxolotlGRPOTrainer
    from strategies.trainers.kto import AxolotlKTOTrainer
    from strategies.trainers.pair import AxolotlDPOTrainer
    from strategies.training import TrainDatasetMeta, train
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.builder": "HFRLTrainerBuilder",
            "strategies.callbacks": "register_callback",
            "strategies.keys": "Keys key",
            "strategies.losses.table": "register_loss",
            "strategies.methods.base": "PairStrategy Strategy",
            "strategies.methods.dpo": "DPOStrategy",
            "strategies.methods.grpo": "GRPOStrategy",
            "strategies.methods.ipo": "IPOStrategy",
            "strategies.methods.kto": "KTOStrategy",
            "strategies.methods.orpo": "ORPOStrategy",
            "strategies.methods.registry": "register_strategy",
            "strategies.methods.simpo": "SimPOStrategy",
            "strategies.plugins": "load_plugins",
            "strategies.trainers.grpo": "AxolotlGRPOTrainer",
            "strategies.trainers.kto": "AxolotlKTOTrainer",
            "strategies.trainers.pair": "AxolotlDPOTrainer",
            "strategies.training": "TrainDatasetMeta train",
        },
    )

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
