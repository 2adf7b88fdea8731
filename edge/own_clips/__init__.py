"""The device's own clips: prototypes, privacy budget, what they show of the user, and comparing two students."""
