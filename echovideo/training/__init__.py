"""Training in two stages: velocity objective, settings, one loop, adapters, checkpoints, on any number of devices."""
