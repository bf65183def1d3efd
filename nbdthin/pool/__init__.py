"""The storage engine: mapping, journal, space. Knows nothing of NBD or of the control protocol."""
