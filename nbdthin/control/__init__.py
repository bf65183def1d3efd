"""The control side: what can be asked of a daemon, over its unix socket, and the clients that ask."""
