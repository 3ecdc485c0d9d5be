"""Forms of data: kinds of files (files.py), rows (rows.py) and messages (messages.py)."""
