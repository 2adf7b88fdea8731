"""What a task is (classes, head, prompts), how it is made from a labelled set, and its files."""
