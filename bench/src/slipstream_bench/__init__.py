"""The benchmark harness: workloads of agents, driven through Slipstream and other servers side by side."""
