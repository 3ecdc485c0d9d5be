"""The tools that a model can call, and the loop that answers its calls."""
