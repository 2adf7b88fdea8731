"""PURE. One engine under two clocks: queries, profiles, the engine, its simulator, and the bound no policy can pass."""
