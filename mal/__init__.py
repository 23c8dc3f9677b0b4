"""Mask Auto-Labeler on Ray: learns masks from boxes alone and labels COCO files of any size.

Importing this package loads neither torch nor ray.
"""

__version__ = "0.1.0"
