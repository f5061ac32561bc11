"""Tools for development and tests; nothing here is in the image."""
