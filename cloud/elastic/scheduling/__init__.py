"""PURE. One engine, two clocks: queries, profiles, the engine, its simulator, and a bound that no policy can exceed."""
