"""The same numbers, sooner. Each file has a plain reference, a switch and a test that they agree; see README.md."""
