"""`python -m dataset.demo` writes the demo data."""

from dataset.demo.files import main

main()
