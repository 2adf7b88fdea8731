"""From files to arrays: clips, pictures, traces, and how each is prepared for the networks."""
