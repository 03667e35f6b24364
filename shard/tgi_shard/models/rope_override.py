"""`--rope-scaling linear` and `--rope-factor`: what a user puts in place of the checkpoint's own scaling."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeOverride:
    factor: float  # positions are divided by it; 1 switches the checkpoint's scaling off
