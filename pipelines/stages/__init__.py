"""The stages of the Ray Data graph, in order: identity, condition, render (which commits)."""
