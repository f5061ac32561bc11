"""The deployment rules by subject. Importing this package registers all of them."""

from tests.deploy.checking import REGISTERED
from tests.deploy.rules import (
    capacity,
    compose,
    image,
    jobs,  # jobs
    network,
    pods,
    probes,
    rollouts,
    secrets,
    shutdown,
    workers,
)

__all__ = ["MODULES", "RULES"]

MODULES = [probes, shutdown, capacity, rollouts, pods, workers, secrets, network, image, compose]
MODULES += [jobs]  # jobs
RULES = REGISTERED
