"""What helps one person: every method of the device, measured on cached features with people as the units."""
