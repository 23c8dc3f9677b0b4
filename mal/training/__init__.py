"""Training from boxes: Ray Train workers that learn a student and its teacher."""
