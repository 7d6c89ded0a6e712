"""Evaluation: named metrics of generated images against reference images."""
