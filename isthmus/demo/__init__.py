"""The demo: the whole loop on one machine, with a cloud and two devices, ending in a report."""
