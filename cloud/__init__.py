"""The cloud: enrols devices, personalises a student for each, and answers their features."""
