"""Evaluation: named metrics of generated images against reference images."""

from cheapscale.evaluation.measure import evaluate

__all__ = ["evaluate"]
