"""A data job as a process of its own, to be killed, and a worker that kills itself once."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

from pipelines.ledger import Claim
from pipelines.training.clips import Clip
from pipelines.training.data import prepare_dataset
from pipelines.training.outcome import ClipOutcome
from pipelines.training.worker import ClipWorker


class DiesOnce(ClipWorker):
    """Ends its own process in the middle of the first clip that it works on, and works as usual when it is back."""

    def _outcome(self, clip: Clip, claim: Claim) -> ClipOutcome:
        died = Path(str(self.job.output)) / "died"
        if not died.exists():
            died.write_bytes(b"")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._outcome(clip, claim)


if __name__ == "__main__":
    prepare_dataset(pickle.loads(Path(sys.argv[1]).read_bytes()))
