"""Flows: the control plane. Prefect's flow and the command line submit runs and follow them; no row passes here."""

from pathlib import Path

DEFAULT_MODELS = Path("~/.cache/echovideo/models")
"""Where the tiny model is built."""
