"""What chat, server, web page and evaluation share: flags, loading a model, and OpenAI's API."""
