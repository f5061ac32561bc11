"""How the service connects to others: URLs, names and addresses."""
