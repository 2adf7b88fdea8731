"""What the device does: its behaviour as data, the runtime that performs it, answering, and the report of a run."""
