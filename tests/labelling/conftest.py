"""The fixtures of `labelling_line`, for every test of this folder."""

from labelling_line import line, undisturbed

__all__ = ["line", "undisturbed"]
