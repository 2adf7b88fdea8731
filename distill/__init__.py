"""Models and learning: train the teacher, choose public samples, and distil students."""
