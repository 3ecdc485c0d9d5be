"""Whole pipelines, from data to a model that one can talk to."""
