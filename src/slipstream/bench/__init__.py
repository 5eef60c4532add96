"""The bench: workloads of agents, driven through this server and others side by side."""
