"""Training over Ray: footage to a dataset's shards."""
