"""Forms of rows that other tools write, and what they are in MiniMind's."""
