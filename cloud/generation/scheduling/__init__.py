"""PURE. One engine, two clocks: requests, blocks, profiles, the engine, its simulator, bounds, workloads."""
