"""A device with a clock of its own, a faulty link, and damage to its files."""
