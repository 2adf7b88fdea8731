"""The cloud: makes devices known, personalises a student for each, and answers their features."""
