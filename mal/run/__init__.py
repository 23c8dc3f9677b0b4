"""A run: its folder with status and manifest, its progress on the screen, and its connection to Ray."""
