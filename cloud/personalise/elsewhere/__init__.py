"""Learning steps of a job on other machines: on a Ray cluster."""
