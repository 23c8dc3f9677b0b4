"""What the user asked for: the spec file as frozen dataclasses, its checks, and the numbers derived from it."""
