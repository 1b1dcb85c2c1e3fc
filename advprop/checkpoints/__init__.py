"""A training checkpoint as something to evaluate, attack with, time or describe."""
