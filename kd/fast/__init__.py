"""The same numbers, sooner. Each fast path has a plain reference, a switch and a test that they agree; see README.md."""
