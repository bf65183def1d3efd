"""Moving data in and out: files, streams, old pools. Works through a daemon, as any client does."""
