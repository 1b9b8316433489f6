"""Where samples come from, and how they become frames of pixels."""
