"""Tasks (classes, a head, prompts): how a task is made from a labelled set, and its files."""
