"""The device's own unlabelled clips: prototypes, privacy budget, habits, and comparing two students."""
