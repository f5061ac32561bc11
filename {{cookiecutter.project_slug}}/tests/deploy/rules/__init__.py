"""The deployment rules by subject. Importing this package registers all of them."""

from tests.deploy.checking import REGISTERED
from tests.deploy.rules import (
    capacity,
    compose,
    image,
    network,
    pods,
    probes,
    rollouts,
    secrets,
    shutdown,
)

__all__ = ["MODULES", "RULES"]

MODULES = (probes, shutdown, capacity, rollouts, pods, secrets, network, image, compose)
RULES = REGISTERED
