"""Attacks on what a device sends, and a report of what each upload gives away."""
