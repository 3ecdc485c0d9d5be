"""What scripts/eval_benchmark.py needs of the third-party evaluation harness."""
