"""What surrounds the training: device, ranks, files, signals, the console, the Hub."""
