"""Experiments on elastic serving: policies compared, warmed models compared, figures."""
