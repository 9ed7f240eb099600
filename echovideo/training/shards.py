"""Examples from a dataset's shards: in epochs, batches of one size, read when they are needed."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from echovideo.errors import DatasetError
from echovideo.hashing import hashed, normal, uniform
from echovideo.model.config import TransformerConfig
from echovideo.training.batch import NullCondition, Stream, TrainingBatch, example_seeds
from echovideo.training.dataset import Dataset, Example, Reference
from echovideo.training.settings import StageSettings

_CACHED = 256


class ShardSource:
    """An ExampleSource over a dataset.

    An epoch takes each example once, in an order of its own; a size whose examples do not fill its last batch begins
    again to fill it. The clip's latents are a sample of their posterior and the reference is one of the settings' kind,
    both by the example's seed. The last 256 examples and references stay in memory.

    Raises DatasetError for a dataset of other widths than the model's, for cross-clip references of people with one
    clip, and, when it comes to it, for a shard that is missing or damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: StageSettings,
        config: TransformerConfig,
        *,
        scaling_factor: float,
        device: torch.device | str,
    ) -> None:
        if settings.references == "cross_clip":
            dataset.check_cross_clip()
        self._dataset = dataset
        self._settings = settings
        self._scaling_factor = scaling_factor
        self._device = torch.device(device)
        self._example = lru_cache(_CACHED)(dataset.example_tensors)
        self._reference = lru_cache(_CACHED)(dataset.reference_tensors)
        self._plan = lru_cache(1)(self._made_plan)
        buckets: dict[str, list[Example]] = {}
        for example in dataset.examples:
            buckets.setdefault(example.bucket, []).append(example)
        self._buckets = [buckets[name] for name in sorted(buckets)]
        self._num_batches = sum(math.ceil(len(bucket) / settings.batch_size) for bucket in self._buckets)
        self._check_widths(config)

    def null(self) -> NullCondition:
        """Return the dataset's null condition, on the device."""
        null = self._dataset.null()
        return NullCondition(text_1ND=null.text_ND[None], face_tokens_1ND=null.tokens_ND[None]).to(self._device)

    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        """Return this process's slice of a step's batch, on the device; see ExampleSource."""
        share = self._settings.batch_size // world_size
        places = torch.arange(rank * share, (rank + 1) * share)
        epoch, number = divmod(step, self._num_batches)
        examples = [self._plan(epoch)[number][place] for place in places.tolist()]
        seeds = example_seeds(self._settings.seed, step, places)
        height, width = examples[0].height, examples[0].width
        clips = [self._example(example) for example in examples]
        chosen = uniform(seeds, 1, Stream.REFERENCE)[:, 0].tolist()
        faces = [
            self._reference(self._chosen(example, draw), height, width)
            for example, draw in zip(examples, chosen, strict=True)
        ]
        mean = torch.stack([clip.latents_mean_FCHW for clip in clips]).float()
        std = torch.stack([clip.latents_std_FCHW for clip in clips]).float()
        sample = mean + std * normal(seeds, mean[0].numel(), Stream.LATENTS).view(mean.shape)
        batch = TrainingBatch(
            latents_BFCHW=sample * self._scaling_factor,
            text_BND=torch.stack([clip.text_ND for clip in clips]),
            face_tokens_BND=torch.stack([face.tokens_ND for face in faces]),
            embedding_BD=torch.stack([face.embedding_D for face in faces]),
            face_mean_BCHW=torch.stack([face.posteriors[height, width][0] for face in faces]),
            face_std_BCHW=torch.stack([face.posteriors[height, width][1] for face in faces]),
            face_share_BFHW=torch.stack([clip.face_share_FHW for clip in clips]).float() / 255,
            seed_B=seeds,
        )
        return batch.to(self._device)

    def _chosen(self, example: Example, draw: float) -> Reference:
        kind = self._dataset.in_clip if self._settings.references == "in_clip" else self._dataset.cross_clip
        references = kind(example)
        return references[int(draw * len(references))]

    def _made_plan(self, epoch: int) -> list[list[Example]]:
        """Return the epoch's batches, each of one bucket."""
        size = self._settings.batch_size
        seed = hashed(hashed(torch.tensor(self._settings.seed)) + epoch)
        batches = []
        for number, bucket in enumerate(self._buckets):
            order = _order(hashed(seed + 1 + number), len(bucket))
            count = math.ceil(len(bucket) / size)
            filled = [bucket[order[i % len(bucket)]] for i in range(count * size)]
            batches += [filled[i * size : (i + 1) * size] for i in range(count)]
        return [batches[i] for i in _order(seed, len(batches))]

    def _check_widths(self, config: TransformerConfig) -> None:
        null = self._dataset.null()
        example = self._dataset.examples[0]
        reference = self._dataset.in_clip(example)[0]
        face = self._reference(reference, example.height, example.width)
        expected = {
            "text": (null.text_ND, (config.max_text_seq_length, config.text_embed_dim)),
            "face tokens": (null.tokens_ND, (config.face_seq_length, config.face_embed_dim)),
            "face embedding": (face.embedding_D, (config.face_features_embed_dim,)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise DatasetError(
                    f"{self._dataset.folder} holds {name} of {tuple(tensor.shape)}, and the model takes {shape}: other "
                    "encoders made it; make the dataset with this model",
                    code="dataset_schema",
                )


def _order(seed: torch.Tensor, count: int) -> list[int]:
    """Return the numbers below `count` in an order of the seed's."""
    order: list[int] = uniform(seed[None], count, 0)[0].argsort(stable=True).tolist()
    return order
