"""What the service holds under load, with a stub in the model's place: `python -m pipelines.serving.benchmarks`.

Service, store, HTTP, claims, MP4s and commits are the real ones, all on this machine, and so is the load generator,
locust, which takes its share of the same cores. Only the networks are replaced, by `stub.py`. Results go to
results/service.json, and `python -m pipelines.serving.benchmarks.table` makes README's table of them.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
