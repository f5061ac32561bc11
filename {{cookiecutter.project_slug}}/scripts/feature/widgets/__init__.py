"""The widgets feature: created, looked up, listed."""
