"""Train the teacher: its branches, their balance, and the held-out clips on which its head is fitted."""
