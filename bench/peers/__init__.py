"""Other engines as measured beside ours: each in an environment of its own, spoken to over a pipe."""
