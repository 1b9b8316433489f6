"""The same numbers, sooner. README.md lists the fast paths.

Each has a plain reference, a switch, and a test that the two agree.
"""
