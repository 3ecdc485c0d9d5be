"""What chat, server and web page share: loading a model, and the types of OpenAI's API."""
