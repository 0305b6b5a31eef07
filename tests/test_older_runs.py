"""Runs of version 0.1 go on and are replayed as they began: their config.toml and journal know less."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.run import Run, fit
from hizoo_lite.train import journal
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.replay import replay
from tests.run_fixtures import short_run

#: What a run of version 0.1 did without a setting that says so.
OLDER = {
    "blocks": "all",
    "train_a": True,
    "curvature_from": "losses",
    "balanced": "off",
    "by_length": "off",
    "directions": 1,
    "head": "estimated",
}
FORM = journal.Form(branches=3, directions=1)


def made_older(run: Run) -> None:
    """Take from a run folder what version 0.1 did not write."""
    config = run.folder / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if line.split(" = ")[0] not in OLDER))
    path = run.folder / "journal.bin"
    data = journal._header(FORM, version=1)
    checksum = zlib.crc32(data)
    for record in journal.read(path):
        packed, checksum = journal._packed(record, FORM, checksum)
        data += packed
    path.write_bytes(data)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """What a run of version 0.1 did without being told."""
    return short_run(tmp_path, **OLDER, batch_size=1)  # so that two batches may change places


def test_an_older_run_is_replayed_bitwise(settings: dict[str, object]) -> None:
    run = fit(TrainConfig(**settings))
    made_older(run)
    found = replay(run.folder)
    assert found.differs == []
    assert len(found.same) >= 3


def test_an_older_run_goes_on_as_it_began(settings: dict[str, object], tmp_path: Path) -> None:
    whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}))
    begun = fit(TrainConfig(**{**settings, "steps": 3}))
    made_older(begun)
    before = RunFolder(begun.folder).config()
    assert {name: getattr(before, name) for name in OLDER} == OLDER
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    adapters = [(r.folder / "adapter/adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert adapters[0] == adapters[1]
    data = (begun.folder / "journal.bin").read_bytes()
    assert data[8] == 1  # the journal keeps the version that it was begun with
    assert journal.read(begun.folder / "journal.bin") == journal.read(whole.folder / "journal.bin")


def test_a_run_along_two_directions_goes_on_and_is_replayed_bitwise(tmp_path: Path) -> None:
    settings = short_run(tmp_path, directions=2)
    whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}))
    fit(TrainConfig(**{**settings, "steps": 3}))
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    adapters = [(r.folder / "adapter/adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert adapters[0] == adapters[1]
    assert resumed.summary["forward_passes"] == 18
    assert replay(resumed.folder).differs == []


def test_a_journal_of_the_other_source_of_curvature_is_refused(settings: dict[str, object]) -> None:
    run = fit(TrainConfig(**{**settings, "curvature_from": "predictions", "steps": 2}))
    config = run.folder / "config.toml"
    config.write_text(
        config.read_text().replace('curvature_from = "predictions"', 'curvature_from = "losses"')
    )
    with pytest.raises(
        UserError, match="step 0: its curvature is from predictions, these settings take the other"
    ):
        replay(run.folder)
