"""How many synthetic clips the tests make: so many takes of each emotion."""

EMOTIONS = ("NEU", "HAP", "SAD", "FEA")
TAKES = 4
