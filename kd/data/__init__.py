"""Datasets: where samples come from, and how their pictures become frames of pixels."""
