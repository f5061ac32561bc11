"""How the service calls other services."""
