"""The pages of scripts/web_demo.py."""
