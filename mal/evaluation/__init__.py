"""Evaluation: how well the masks of a checkpoint agree with those of a file."""
