"""Frozen feature networks: `load` one by name; `FeatureNetwork` is what it returns."""

from cheapscale.models.features.loading import load
from cheapscale.models.features.network import FeatureNetwork

__all__ = ["FeatureNetwork", "load"]
