"""Building blocks that survive crashes and outages; copy one with its tests."""
