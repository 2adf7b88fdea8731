"""The device at work: the runtime that performs its behaviour, answers, and the report of a run."""
