"""What a trained model has learned: evaluated on pairs, answering beside its reference."""
