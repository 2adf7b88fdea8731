"""A personalisation from a device's prototypes to its signed student: state machine, worker, and files."""
