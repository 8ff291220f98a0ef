"""Experiment trackers, told by the driver: it has every record once, knows how a run ends, and holds the keys.

`tracking.py` tells them, `line.py` keeps what they do apart from training, and each has a file: `to_tensorboard.py`,
`to_wandb.py`, `to_mlflow.py`, `to_trackio.py`. Workers report to nobody.
"""
