"""After training, and what the end of a run calls. By `python -m kd COMMAND`."""
