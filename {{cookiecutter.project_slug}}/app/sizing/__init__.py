"""How many workers and connections fit here, and whether the settings agree."""
