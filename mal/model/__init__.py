"""The network that turns crops into mask logits, its losses, its schedule and its weights on disk. No ray, no data."""
