"""Training: the shards it reads, and the loop that learns from them; plain torch."""
