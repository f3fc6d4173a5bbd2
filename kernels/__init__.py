"""Mutual scoring: how unlike every patch is to the nearest patches of the other images."""

from .mutual_scoring import mutual_scores

__all__ = ["mutual_scores"]
