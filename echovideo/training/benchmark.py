"""A training step of the full-size model, measured: `python -m echovideo.training.benchmark --commit COMMIT`.

At 480x848, 49 frames, 226 text tokens, a batch of 1 a GPU, random bfloat16 weights: seconds, peak memory and model-FLOP
utilisation, each with the fewest recomputing blocks that fit, beside diffusers' CogVideoX transformer with its gradient
checkpointing, PyTorch's attention and the same optimizer. With `--gpus 2`, FSDP2 over two GPUs beside one instead.
Prints a table and writes results/step.json, or step_2_gpus.json, into the folder `--out`.

PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets a block or two more fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from torch.multiprocessing.spawn import spawn

from echovideo.errors import TrainingError
from echovideo.hashing import normal, uniform
from echovideo.model.config import TransformerConfig
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.results import Row, machine_name, write_results
from echovideo.training.batch import NullCondition, TrainingBatch, example_seeds
from echovideo.training.loop import Trainer
from echovideo.training.objective import NoiseSchedule, draw
from echovideo.training.optimizer import MasterAdamW
from echovideo.training.settings import AdapterSettings, StageSettings, stage_one, stage_two

PEAK_TFLOPS = 989.0
"""bfloat16, dense, of an H200."""
SECONDS_BAR, UTILISATION_BAR, SCALING_BAR = 2.9, 0.44, 1.9
DIFFUSERS = "diffusers, gradient checkpointing"
RESULTS = Path(__file__).parent / "results"
_WARM_UP, _TIMED = 1, 4
_LORA = AdapterSettings(rank=128, groups=("attention", "feed_forward"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a step is measured on: the model, the latents' frames, height and width, and the device."""

    config: TransformerConfig
    frames: int
    height: int
    width: int
    device: str
    dtype: torch.dtype

    @property
    def tokens(self) -> tuple[int, int]:
        """Video tokens and text tokens of an example."""
        patch = self.config.patch_size
        return self.frames * (self.height // patch) * (self.width // patch), self.config.max_text_seq_length


FULL_SIZE = Case(config=TransformerConfig(), frames=13, height=60, width=106, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The median step's seconds, the peak of allocated memory in GiB, and how many blocks were recomputed."""

    seconds: float
    peak: float
    recomputed_blocks: int


def step_flops(case: Case, *, backbone_trained: bool) -> float:
    """Return the floating point operations that a step of one example needs, recomputation not counted.

    Linear layers that act on every token take 2 a weight and token, attention 4 N^2 D a block; the backward pass takes
    twice as much again, and once as much for a linear layer whose weights are frozen. What is the same for all tokens
    (modulation, IITF) is left out.
    """
    config = case.config
    num_video, num_text = case.tokens
    num_tokens, dim, patch = num_video + num_text, config.inner_dim, config.patch_size**2
    blocks = 2 * num_tokens * 12 * dim**2 * config.num_layers
    ends = 2 * num_video * dim * patch * (config.in_channels + config.out_channels)
    ends += 2 * num_text * dim * config.text_embed_dim
    attention = 4 * num_tokens**2 * dim * config.num_layers
    return float((3 if backbone_trained else 2) * (blocks + ends) + 3 * attention)


def stages(batch_size: int) -> dict[str, StageSettings]:
    """Return the settings that are measured, by name."""
    common = {"steps": 1000, "batch_size": batch_size}
    return {
        "stage 2, full": stage_two(**common, recompute="elementwise"),
        "stage 2, LoRA-128": stage_two(**common, groups=("fusion", "patch_embed"), adapter=_LORA),
        "stage 1, full fusion": stage_one(**common),
        "stage 1, LoRA-128": stage_one(**common, adapter=_LORA),
    }


def measure_ours(case: Case, settings: StageSettings) -> Measurement:
    """Measure our step with the fewest recomputed blocks that fit; on every process of the default group."""
    trainer = Trainer(_model(case), _schedule(case), _null(case), settings)
    rank, share = (dist.get_rank(), 1) if dist.is_initialized() else (0, settings.batch_size)
    batch = _batch(case, rank * share + torch.arange(share))

    def step() -> torch.Tensor:
        return trainer.take(batch)["skipped"]

    def peak(recomputed_blocks: int) -> float:
        trainer.model.recomputed_blocks = recomputed_blocks
        return _peak(step, case.device)

    blocks = case.config.num_layers
    fewest = _fewest_blocks(peak, blocks, _memory(case.device))
    while True:
        try:
            trainer.model.recomputed_blocks = fewest
            return replace(_measure(step, case.device), recomputed_blocks=fewest)
        except TrainingError as error:
            if error.code != "out_of_memory" or fewest == blocks or dist.is_initialized():
                raise
            reason = error.message
        # Here, where no traceback holds the step's tensors any more.
        print(f"{fewest} recomputed blocks do not fit: {reason}", flush=True)
        trainer.model.zero_grad()
        _clear(case.device)
        fewest = min(blocks, fewest + 2)


def measure_diffusers(case: Case) -> Measurement:
    """Measure the same objective and optimizer around diffusers' transformer, all blocks recomputed as it does it."""
    config = case.config
    with _making(case):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            time_embed_dim=config.time_embed_dim,
            text_embed_dim=config.text_embed_dim,
            num_layers=config.num_layers,
            attention_bias=config.attention_bias,
            patch_size=config.patch_size,
            max_text_seq_length=config.max_text_seq_length,
            use_rotary_positional_embeddings=True,
        )
    model.train()
    model.enable_gradient_checkpointing()
    settings = stage_two(steps=1000, batch_size=1)
    optimizer = MasterAdamW(model.named_parameters(), settings)
    schedule, batch = _schedule(case), _batch(case, torch.arange(1))
    patch = config.patch_size
    grid = (case.frames, case.height // patch, case.width // patch)
    rotary = rotary_tables(*grid, config.attention_head_dim, case.device)

    def step() -> torch.Tensor:
        draws = draw(batch, len(schedule.signal_T), settings)
        signal, noise = (t[draws.timestep_B].view(-1, 1, 1, 1, 1) for t in (schedule.signal_T, schedule.noise_T))
        latents = batch.latents_BFCHW
        noisy = signal * latents + noise * draws.noise_BFCHW
        (predicted,) = model(
            hidden_states=torch.cat([noisy, torch.zeros_like(noisy)], dim=2).to(case.dtype),
            encoder_hidden_states=batch.text_BND,
            timestep=draws.timestep_B,
            image_rotary_emb=rotary,
            return_dict=False,
        )
        loss = (predicted.float() - (signal * draws.noise_BFCHW - noise * latents)).square().mean()
        loss.backward()
        *_, bad = optimizer.step(0, loss[None])
        return bad

    return _measure(step, case.device)


def rows_of_one(case: Case) -> Iterator[Row]:
    """Measure all stages on one GPU, the full fine-tune beside diffusers."""
    for name, settings in stages(1).items():
        found = measure_ours(case, settings)
        _clear(case.device)
        flops = step_flops(case, backbone_trained=settings.groups == stage_two(steps=1, batch_size=1).groups)
        is_full = name == "stage 2, full"
        peer: Measurement | str | None = None
        if is_full:
            try:
                peer = measure_diffusers(case)
            except torch.OutOfMemoryError as error:
                peer = str(error).splitlines()[0]
            _clear(case.device)

        label = f"{name}, {found.recomputed_blocks} of {case.config.num_layers} blocks recompute {settings.recompute}"
        for metric, unit, bar, value in (
            ("time of a step", "s", SECONDS_BAR, _seconds),
            ("model-FLOP utilisation", "of 989 TFLOP/s", UTILISATION_BAR, partial(_utilisation, flops)),
            ("peak memory", "GiB", None, _gibibytes),
        ):
            yield Row(
                name=label,
                metric=metric,
                value=value(found),
                unit=unit,
                floor=bar if is_full else None,
                against={} if peer is None else {DIFFUSERS: peer if isinstance(peer, str) else value(peer)},
            )


def _seconds(measured: Measurement) -> float:
    return measured.seconds


def _utilisation(flops: float, measured: Measurement) -> float:
    return flops / measured.seconds / PEAK_TFLOPS / 1e12


def _gibibytes(measured: Measurement) -> float:
    return measured.peak


def rows_of_many(case: Case, gpus: int) -> Iterator[Row]:
    """Measure the full fine-tune on one GPU, then sharded over `gpus`, with a batch of 1 a GPU."""
    alone = measure_ours(case, stages(1)["stage 2, full"])
    _clear(case.device)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_one_of_many, (case, gpus, folder), nprocs=gpus)
        together = Measurement(**json.loads((Path(folder) / "measurement.json").read_text()))
    name = f"stage 2, full, FSDP2 on {gpus} GPUs"
    for metric, unit, one, many in (
        ("time of a step", "s", alone.seconds, together.seconds),
        ("peak memory of a GPU", "GiB", alone.peak, together.peak),
        ("recomputed blocks", "", float(alone.recomputed_blocks), float(together.recomputed_blocks)),
    ):
        yield Row(name=name, metric=metric, value=many, unit=unit, against={"one GPU": one})
    scaling = gpus * alone.seconds / together.seconds
    yield Row(name=name, metric="examples a second over one GPU's", value=scaling, unit="x", floor=SCALING_BAR)


def _one_of_many(rank: int, case: Case, gpus: int, folder: str) -> None:
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if case.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=gpus)
    found = measure_ours(case, stages(gpus)["stage 2, full"])
    if rank == 0:
        (Path(folder) / "measurement.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def _fewest_blocks(peak: Callable[[int], float], blocks: int, memory: float) -> int:
    """Return how many blocks to recompute, from the peaks of two budgets: a block that is not adds the same each.

    A twentieth of the memory stays free, for the allocator's gaps. Processes take the largest of their numbers.
    """
    if math.isinf(memory):
        return 0
    fewer = blocks - max(1, blocks // 10)
    most = peak(blocks)
    a_block = max((peak(fewer) - most) / (blocks - fewer), 1e-3)
    fewest = min(blocks, max(0, blocks - int((0.95 * memory - most) / a_block)))
    if dist.is_initialized():
        found = torch.tensor(fewest, device="cuda")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        fewest = int(found)
    return fewest


def _measure(step: Callable[[], torch.Tensor], device: str) -> Measurement:
    """Time a step, which returns 1 if its numbers were not finite; then it would have left out work."""
    for _ in range(_WARM_UP):
        assert float(step()) == 0, "the step gave no finite loss or gradient"
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(_TIMED):
        _finish(device)
        start = time.perf_counter()
        step()
        _finish(device)
        times.append(time.perf_counter() - start)
    return Measurement(seconds=statistics.median(times), peak=_allocated(device), recomputed_blocks=0)


def _peak(step: Callable[[], object], device: str) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    _finish(device)
    return _allocated(device)


def _allocated(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def _memory(device: str) -> float:
    """Return the device's memory in GiB; of a CPU's, as much as is asked for."""
    if device == "cpu":
        return math.inf
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / 2**30


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _making(case: Case) -> Iterator[None]:
    """Make weights where they stay: in the case's type, on its device."""
    previous = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            yield
    finally:
        torch.set_default_dtype(previous)


def _model(case: Case) -> EchoVideoTransformer3DModel:
    with _making(case):
        return EchoVideoTransformer3DModel(case.config)


def _schedule(case: Case) -> NoiseSchedule:
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    return NoiseSchedule.of(scheduler, 0.7, case.device)


def _null(case: Case) -> NullCondition:
    batch = _batch(case, torch.tensor([99]))
    return NullCondition(text_1ND=batch.text_BND, face_tokens_1ND=batch.face_tokens_BND)


def _batch(case: Case, places: torch.Tensor) -> TrainingBatch:
    config, count = case.config, len(places)
    seeds = example_seeds(0, 0, places.to(case.device))

    def states(stream: int, *shape: int) -> torch.Tensor:
        return normal(seeds, math.prod(shape), stream << 12).view(count, *shape)

    size = (case.height, case.width)
    return TrainingBatch(
        latents_BFCHW=states(1, case.frames, config.out_channels, *size),
        text_BND=states(2, config.max_text_seq_length, config.text_embed_dim).to(case.dtype),
        face_tokens_BND=states(3, config.face_seq_length, config.face_embed_dim).to(case.dtype),
        embedding_BD=states(4, config.face_features_embed_dim),
        face_mean_BCHW=states(5, config.out_channels, *size),
        face_std_BCHW=states(6, config.out_channels, *size).abs(),
        face_share_BFHW=uniform(seeds, case.frames * math.prod(size), 7 << 12).view(count, case.frames, *size),
        seed_B=seeds,
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m echovideo.training.benchmark")
    parser.add_argument("--commit", required=True, help="the commit measured; the GPU machine may have no history")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results file")
    parser.add_argument("--gpus", type=int, default=1, help="with more than 1: FSDP2 over so many, beside one")
    options = parser.parse_args()
    measured = rows_of_one(FULL_SIZE) if options.gpus == 1 else rows_of_many(FULL_SIZE, options.gpus)
    rows = []
    for row in measured:
        print(f"{row.name}: {row.metric} {row.value:.3f} {row.unit}", flush=True)
        rows.append(row)
    name = "step" if options.gpus == 1 else f"step_{options.gpus}_gpus"
    machine = f"{options.gpus} x {machine_name('cuda')}"
    write_results(
        name, rows, options.out, machine=machine, packages=("torch", "triton", "diffusers"), commit=options.commit
    )


if __name__ == "__main__":
    main()
