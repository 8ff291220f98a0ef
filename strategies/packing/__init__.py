"""Packed batches: several pairs in one row of tokens, each prompt once, no attention across, no logits in full."""
