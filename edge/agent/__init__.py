"""The device at work: its behaviour as data, the runtime that performs it, answers, and the report of a run."""
