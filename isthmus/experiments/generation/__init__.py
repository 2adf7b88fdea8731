"""Experiments on generation: policies, predictors, fairness, replicas and placements compared by simulation."""
