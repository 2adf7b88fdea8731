"""What the device learns from its own unlabelled clips: prototypes, habits, and whether a new student pays."""
