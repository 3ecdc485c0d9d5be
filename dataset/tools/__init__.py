"""The tools that a model can call, and the loop that answers its calls."""

MAX_TURNS = 4  # replies to one question; without a limit a model may call tools for ever
