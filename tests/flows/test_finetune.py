"""A person learnt from drawn footage by the command line, then asked for by rows of a batch."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from echovideo.errors import DatasetError, RequestError, StorageError
from echovideo.model.card import TINY, folder_digest
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.request import RenderRequest
from echovideo.tiny.folder import tiny_folder
from echovideo.training.adapters import Adapter
from echovideo.training.journal import read_metrics
from echovideo.training.loop import Validate, train
from echovideo.training.settings import one_person
from echovideo.training.trial import VALIDATION_PROMPTS, prompt_states, validation_scores
from echovideo.video import decode_mp4
from flows.cli import app
from flows.finetune import FinetuneSettings, plan_finetune
from pipelines.identities import file_sha256
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath
from pipelines.training.finetune import Finetune, FinetuneConfig
from pipelines.training.train import dataset_ingredients
from tests.echovideo.footage.drawn import FRAMES, drawn_clips, write
from tests.echovideo.training.small import Kept
from tests.flows.conftest import Command, Running

STEPS = 2


def write_clips(path: Path, rows: list[dict[str, str | None]]) -> Path:
    """Write a clip manifest whose rows are drawn footage beside it."""
    good = {"caption": "A person talks.", "person_id": "ann", "consent_id": "c-1"}
    pq.write_table(pa.Table.from_pylist([{**good, **row} for row in rows]), path)
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """A person who was learnt: the footage's folder, the output, and what the command said."""

    footage: Path
    output: Path
    models: Path
    command: Command

    def config(self, manifest: str = "clips.parquet", consent_id: str = "c-1", **settings: object) -> FinetuneConfig:
        """Return the job that the command made of its arguments, or another one."""
        values = {"steps": STEPS, "rank": 2, "trial_steps": 1, "device": "cpu", "models": str(self.models), **settings}
        return plan_finetune(
            str(self.footage / manifest), str(self.output), "ann", consent_id, "tiny", FinetuneSettings(**values)
        )

    def elsewhere(self, folder: Path, config: FinetuneConfig) -> Finetune:
        """Return the job of a config at work in a copy of the work folder."""
        return Finetune(replace(config, work=shutil.copytree(config.work, folder / "work")))


@pytest.fixture(scope="module")
def learnt(models: Path, with_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """Learn a drawn person from two clips; a third has no caption."""
    footage, output = tmp_path_factory.mktemp("footage"), tmp_path_factory.mktemp("output")
    for name in ("ann-1", "ann-2"):
        write(drawn_clips(FRAMES)[name].frames, footage / f"{name}.mp4")
    rows: list[dict[str, str | None]] = [{"clip_id": name, "clip_uri": f"{name}.mp4"} for name in ("ann-1", "ann-2")]
    rows += [{"clip_id": "silent", "clip_uri": "ann-1.mp4", "caption": None}]
    manifest = write_clips(footage / "clips.parquet", rows)
    arguments = ["train", str(manifest), str(output), "--name", "ann", "--consent", "c-1", "--steps", str(STEPS)]
    arguments += ["--rank", "2", "--trial-steps", "1", "--device", "cpu"]
    return Learnt(footage=footage, output=output, models=models, command=Running(arguments, with_server).end())


def test_train_registers_an_adapter_with_consent_licence_and_scores(learnt: Learnt) -> None:
    assert learnt.command.status == 0, learnt.command.stderr
    document = learnt.command.document
    card = document["identity"]
    assert json.loads((learnt.output / "identities/ann/card.json").read_text()) == card
    path = learnt.output / "identities/ann" / card["file"]
    assert file_sha256(path) == card["sha256"]
    assert (card["consent_id"], card["licence"], card["model"]) == ("c-1", "Apache-2.0", TINY.name)
    assert card["base_digest"] == folder_digest(tiny_folder(learnt.models))
    adapter = Adapter.load(path)
    assert (adapter.card.rank, adapter.card.groups, adapter.card.adapted_groups) == (2, ("fusion",), ("attention",))
    assert (adapter.card.base_digest, adapter.card.consent_id) == (card["base_digest"], "c-1")
    assert card["made"]["settings"] == one_person(steps=STEPS, batch_size=1, rank=2).to_dict()
    assert card["made"]["scores"] == document["scores"]
    assert (document["scores"]["videos"], document["scores"]["steps"]) == (8, 1)


def test_train_tells_of_clips_left_out_and_draws_its_report(learnt: Learnt) -> None:
    document = learnt.command.document
    assert (document["clips"]["ok"], document["clips"]["rejected"]) == (2, 1)
    assert document["left_out"] == {"silent": "row 2: caption is missing; say what the person does in the clip"}
    page = Path(document["report"]).read_text()
    assert page.count("data:image/jpeg;base64,") == 1
    assert TINY.notice in page
    assert "no faces that can be told apart" not in page
    assert page.count("A person smiles in a park.") == 4
    validations = [line for line in read_metrics(Path(document["report"]).parent) if "scores" in line]
    assert document["scores"]["validations"] == validations
    assert [validation["steps"] for validation in validations] == [1, 2]
    assert page.count(f"<td>{document['scores']['trained_steps']}, kept</td>") == 1


def test_train_exports_the_weights_of_the_best_validation_and_not_the_last(
    learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "transformer_blocks.0.attn1.to_q.lora_up"
    seen: dict[int, torch.Tensor] = {}

    def falling(transformer: EchoVideoTransformer3DModel, steps: int, **_: object) -> dict[str, float]:
        seen[steps] = transformer.get_parameter(name).detach().clone()
        return {"score": 1 / steps, "similarity": 1 / steps, "detection_rate": 1.0}

    monkeypatch.setattr("pipelines.training.finetune.validation_scores", falling)
    config = learnt.config(steps=3, validate_every=1, learning_rate=1e-3)
    job = learnt.elsewhere(tmp_path, replace(config, name="another"))
    adapter = Adapter.load(job.train() / "adapter.safetensors")
    assert list(seen) == [1, 2, 3]
    assert torch.equal(adapter.tensors[name], seen[1])
    assert not torch.equal(seen[1], seen[3])
    # Of other denoising steps.
    (job.folder / "trial.json").write_text('{"steps": 2}')
    assert job.evaluate()["trained_steps"] == 1
    assert "<td>1 of 3, the best by validation</td>" in (job.folder / "report.html").read_text()


def test_train_with_validation_takes_the_same_steps_to_the_bit(learnt: Learnt) -> None:
    config = learnt.config(steps=3, validate_every=2, learning_rate=1e-3)
    model, dataset = Path(config.model), config.work / "dataset"
    texts = prompt_states(model, VALIDATION_PROMPTS, config.engine)
    assert {prompt: states.device.type for prompt, states in texts.items()} == {VALIDATION_PROMPTS[0]: "cpu"}
    validate = partial(validation_scores, model=model, dataset=dataset, texts=texts, settings=config.engine)

    def run(validate: Validate | None) -> tuple[Kept, EchoVideoTransformer3DModel]:
        made, kept = dataset_ingredients(model, dataset, config.settings, torch.device("cpu")), Kept()
        train(made.model, made.schedule, made.source, made.null, config.settings, record=kept, validate=validate)
        return kept, made.model

    # Rendering pins two threads, and with them sums are others.
    torch.set_num_threads(1)
    with_scores, validated = run(pickle.loads(pickle.dumps(validate)))
    assert torch.get_num_threads() == 1
    without, plain = run(None)
    assert with_scores.losses == without.losses
    for name, parameter in plain.named_parameters():
        assert torch.equal(validated.get_parameter(name), parameter), name
        assert validated.get_parameter(name).requires_grad == parameter.requires_grad, name
    assert [found.steps for found in with_scores.scores] == [2, 3]
    first, last = (dict(found.scores) for found in with_scores.scores)
    assert first["score"] == first["similarity"] * first["detection_rate"]
    assert first["similarity"] != last["similarity"]


def test_train_again_makes_nothing_anew(learnt: Learnt) -> None:
    job = Finetune(learnt.config())
    # Every table of the dataset is written again; what costs time is not.
    made = [path for path in learnt.output.rglob("*.safetensors") if path.name != "null.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in made}
    job.check()
    assert job.prepare().counts["ok"] == 2
    (job.folder / "checkpoints").mkdir()
    assert str(job.train()) == str(Path(learnt.command.document["report"]).parent)
    assert job.register(job.evaluate()).sha256 == learnt.command.document["identity"]["sha256"]
    assert len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert not (job.folder / "checkpoints").exists()


def test_train_with_other_settings_under_a_taken_name_is_refused_before_it_trains(learnt: Learnt) -> None:
    with pytest.raises(StorageError, match="choose another name") as caught:
        Finetune(learnt.config(steps=STEPS + 1)).train()
    assert caught.value.code == "identity_exists"


def test_train_with_one_clip_only_says_whose(learnt: Learnt, tmp_path: Path) -> None:
    write_clips(learnt.footage / "one.parquet", [{"clip_id": "ann-1", "clip_uri": "ann-1.mp4"}])
    job = learnt.elsewhere(tmp_path, learnt.config("one.parquet"))
    with pytest.raises(DatasetError, match="ann") as caught:
        job.prepare()
    assert caught.value.code == "one_clip"


@pytest.mark.parametrize(
    ("rows", "consent_id", "code", "message"),
    [
        ([{}], "c-2", "consent_mismatch", "clips a have another consent_id than 'c-2'"),
        ([{}, {"clip_id": "b", "person_id": "bob"}], "c-1", "several_people", "ann, bob"),
        ([{"caption": None}], "c-1", "no_clips", "caption is missing"),
        ([{}], " ", "consent_missing", "consent id is needed"),
    ],
)
def test_train_manifest_that_could_not_be_registered_is_refused_at_once(
    learnt: Learnt, rows: list[dict[str, str | None]], consent_id: str, code: str, message: str
) -> None:
    good = {"clip_id": "a", "clip_uri": "ann-1.mp4"}
    write_clips(learnt.footage / "bad.parquet", [{**good, **row} for row in rows])
    with pytest.raises(RequestError, match=message) as caught:
        Finetune(learnt.config("bad.parquet", consent_id)).check()
    assert caught.value.code == code


def test_train_error_is_one_document_with_its_code(learnt: Learnt, with_server: dict[str, str]) -> None:
    arguments = ["train", str(learnt.footage / "clips.parquet"), str(learnt.output), "--name", "ann"]
    command = Running([*arguments, "--consent", "c-2", "--device", "cpu"], with_server).end()
    assert (command.status, command.document["error"]) == (1, "consent_mismatch")
    assert "Traceback" not in command.stderr


def test_batch_rows_with_an_identity_get_other_videos_and_wrong_ones_a_reason(
    learnt: Learnt, photos: Path, with_server: dict[str, str], tmp_path: Path
) -> None:
    def row(row_id: str, identity_lora: str | None, consent_id: str | None = "c-1") -> RenderRequest:
        return RenderRequest(
            row_id=row_id,
            prompt="A person waves",
            photo_uri=str(photos / "astronaut.png"),
            height=96,
            width=96,
            num_frames=9,
            num_inference_steps=2,
            identity_lora=identity_lora,
            consent_id=consent_id,
        )

    rows = [row("1-with", "ann"), row("2-plain", None), row("3-unknown", "anna"), row("4-consent", "ann", None)]
    write_manifest(rows, StoragePath.parse(str(tmp_path / "rows.parquet")))
    output = shutil.copytree(learnt.output, tmp_path / "output")
    arguments = ["batch", "run", str(tmp_path / "rows.parquet"), str(output), "--allow-root", str(photos)]
    command = Running([*arguments, "--device", "cpu"], with_server).end()
    assert command.status == 0, command.stderr
    without = {line["row_id"]: line for line in command.document["without_video"]}
    assert {row_id: line["code"] for row_id, line in without.items()} == {
        "3-unknown": "unknown_identity",
        "4-consent": "identity_consent",
    }
    assert "there are: ann" in without["3-unknown"]["message"]
    made = {}
    for path in output.glob("videos/*/*.json"):
        sidecar = json.loads(path.read_text())
        made[sidecar["first_made_for"]["row_id"]] = sidecar
    frames = {name: decode_mp4(next(output.glob(f"videos/*/{made[name]['file']}"))) for name in made}
    assert (frames["1-with"] != frames["2-plain"]).any()
    assert made["1-with"]["identity_lora"] == learnt.command.document["identity"]
    assert "identity_lora" not in made["2-plain"]
    with av.open(next(output.glob(f"videos/*/{made['1-with']['file']}"))) as container:
        said = json.loads(container.metadata["comment"])
    assert (said["adapter"], said["licence"]) == (made["1-with"]["identity_lora"]["sha256"], "Apache-2.0")
    # The plain row came second, after the adapter had been taken out again: it is what the plain model renders.
    one = tmp_path / "one.mp4"
    arguments = ["render", str(photos / "astronaut.png"), "A person waves", "--out", str(one), "--size", "96x96"]
    arguments += ["--frames", "9", "--steps", "2", "--device", "cpu", "--models", str(learnt.models), "--json"]
    rendered = CliRunner().invoke(app, arguments)
    assert rendered.exit_code == 0, rendered.output
    assert (decode_mp4(one) == frames["2-plain"]).all()


def test_identities_are_listed_and_deleted_with_their_training(learnt: Learnt, tmp_path: Path) -> None:
    output = shutil.copytree(learnt.output, tmp_path / "output")
    listed = CliRunner().invoke(app, ["identities", "list", str(output), "--json"])
    assert json.loads(listed.stdout) == {"identities": [learnt.command.document["identity"]]}
    deleted = CliRunner().invoke(app, ["identities", "delete", str(output), "ann", "--yes", "--json"])
    assert json.loads(deleted.stdout) == {"name": "ann", "deleted": True}
    assert [path for path in output.rglob("*") if path.is_file()] == []
    again = CliRunner().invoke(app, ["identities", "delete", str(output), "ann", "--yes"])
    assert again.exit_code == 1
    assert "Error [unknown_identity]" in again.stderr
