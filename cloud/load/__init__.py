"""Load on a running cloud: devices and image queries over many real connections, and how they were answered."""
