"""Metrics of finished models: exact match, and adapters to lm-evaluation-harness."""
