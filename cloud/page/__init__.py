"""The serving side's page: queue, gammas, outcomes, load and jobs, read from the service's metrics."""
