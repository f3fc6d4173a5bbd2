"""Mutual scoring: how unlike every patch is to the nearest patches of the other images."""

from .averages import kept_averages
from .mutual_scoring import mutual_scores

__all__ = ["kept_averages", "mutual_scores"]
