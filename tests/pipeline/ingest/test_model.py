"""Random histories of a real store, compared row by row with a model in plain Python.

Histories of 25 steps: 8 in `make test`; `DICCAE_MODEL_RUNS` sets how many the one by hand tries.
"""

import dataclasses
import itertools
import os

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.store_machine import StoreMachine

from pipeline.ingest import plan, run
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.snapshot import Snapshot


def settings_of(n_runs: int, **changes) -> settings:
    return settings(
        max_examples=n_runs, stateful_step_count=25, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), **changes,
    )  # fmt: skip


MANY = int(os.environ.get("DICCAE_MODEL_RUNS", "200"))


@pytest.mark.parametrize("n_runs", [8, pytest.param(MANY, marks=pytest.mark.soak)])
def test_any_history_leaves_what_the_model_says(n_runs):
    run_machine(StoreMachine, settings=settings_of(n_runs))


def test_a_run_that_is_killed_at_any_of_its_writes_and_repeated_loses_nothing():
    for after in itertools.count():
        machine = StoreMachine()
        try:
            machine.first_clips(5, "sha256")
            machine.touch_all()
            machine.delete_file("c0")
            machine.unlist("c1")
            machine.relabel("c2", "cat", "t")
            machine.ingest_that_is_killed(0, "sha256", False, True, after)
            machine.add("c5", "good2")
            machine.ingest_that_is_killed(1, "sha256", False, True, after)
            machine.ingest(1, "sha256", False, True)
            machine.ingest(0, "sha256", False, True)
        finally:
            machine.teardown()
        if not machine.was_killed:
            break
    assert after >= 16, "a run of all kinds of work has more writes than that"


def plant_features_of_the_old_spec(machine: StoreMachine) -> None:
    """A clip that was touched is written down as one of the new spec, without a decode."""
    classify, restate = plan._classify, run._restate

    def classified(clips, config):
        kinds = classify(clips, config)
        hidden = kinds.spec_changed & clips.touched
        return dataclasses.replace(
            kinds,
            spec_changed=kinds.spec_changed & ~hidden,
            kept=kinds.kept | hidden,
            moved=kinds.moved | hidden,
        )

    def stamped(states: pa.Table, restated: pa.Table) -> pa.Table:
        rows = restate(states, restated)
        index = CLIPS_SCHEMA.get_field_index("spec_hash")
        column = pa.array([machine.made.spec] * len(rows), pa.string())
        return rows.set_column(index, CLIPS_SCHEMA.field(index), column)

    machine.patch.setattr(plan, "_classify", classified)
    machine.patch.setattr(run, "_restate", stamped)


def plant_spec_of_the_newest_row(machine: StoreMachine) -> None:
    """No version names its spec: that of the newest row is taken for it."""
    machine.patch.setattr(Snapshot, "names_its_spec", False)


@pytest.mark.parametrize("plant", [plant_features_of_the_old_spec, plant_spec_of_the_newest_row])
def test_planted_faults_are_found_in_what_is_stored(plant):
    class Planted(StoreMachine):
        compares_plans = False

        def patch_store(self) -> None:
            super().patch_store()
            plant(self)

    search = settings_of(200, derandomize=True, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError):
        run_machine(Planted, settings=search)
