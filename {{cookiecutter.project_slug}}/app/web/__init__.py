"""What surrounds every request: its ID, its limits, its probes, and the shape of its errors."""
