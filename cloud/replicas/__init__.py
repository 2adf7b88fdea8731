"""Replicas of a language model that this server runs: in processes of their own, or in actors on a Ray cluster."""
