"""The number of synthetic clips in tests: takes of each emotion."""

EMOTIONS = ("NEU", "HAP", "SAD", "FEA")
TAKES = 4
