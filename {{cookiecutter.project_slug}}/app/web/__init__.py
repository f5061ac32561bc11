"""The surroundings of every request: its ID, its limits, its probes, the shape of its errors."""
