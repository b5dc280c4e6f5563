"""Which earlier run the live page compares with."""

import pytest

from tests.run_folders import write_run
from trainer.monitor.comparison import find_earlier
from trainer.monitor.summary import changed_settings, read_summary, row_at
from trainer.run import Run
from trainer.settings import validated

HERE = 5_000.0


@pytest.fixture
def here(tmp_path):
    """A run with runs beside it that must not be chosen."""
    runs = tmp_path / "runs"
    write_run(runs / "another-recipe", [0.1], begun=HERE - 1, recipe="small")
    write_run(runs / "another-dataset", [0.1], begun=HERE - 2, dataset="other")
    write_run(runs / "not-evaluated", [], begun=HERE - 3)
    write_run(runs / "later", [0.1], begun=HERE + 9)
    (write_run(runs / "damaged", [0.1], begun=HERE - 4) / "evaluations.csv").write_text("step\n1\n2\n")
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    return write_run(runs / "here", [0.5], begun=HERE, seed=3)


def found(here, **settings):
    return find_earlier(Run(here), validated(settings))


def test_the_run_that_was_begun_last_with_the_same_recipe_and_dataset_is_chosen(here):
    assert found(here) == (None, "")
    for name, begun in (("a", HERE - 70), ("b", HERE - 60), ("c", HERE - 80)):
        write_run(here.parent / name, [0.4, 0.3], begun=begun, learning_rate=0.5)
    earlier, note = found(here)
    assert (earlier.summary.folder.name, note) == ("b", "")
    assert earlier.differing == "seed is 3 instead of 0, learning_rate is 0.003 instead of 0.5"


def test_compare_names_any_run(here):
    earlier, note = found(here, compare=here.parent / "another-dataset")
    assert note == ""
    assert earlier.differing == "the dataset is another one, seed is 3 instead of 0"


def test_a_damaged_run_to_compare_with_is_one_line(here):
    earlier, note = found(here, compare=here.parent / "damaged")
    assert earlier is None
    assert note.startswith(f"not compared with {here.parent / 'damaged'}: ")
    assert "evaluations.csv is damaged" in note
    assert "\n" not in note


def test_rows_are_found_by_epoch(here):
    rows = read_summary(write_run(here.parent / "x", [0.4, 0.3, 0.2])).evaluations
    assert row_at(0.9, rows) is None
    assert row_at(2.0, rows)["top1_error"] == 0.3
    assert row_at(2.9, rows)["top1_error"] == 0.3
    assert row_at(99, rows)["top1_error"] == 0.2


def test_the_changed_settings_are_those_that_were_given(tmp_path):
    recorded = read_summary(write_run(tmp_path / "x", seed=7, epochs=9, log_every=3, dropout="2012")).recorded
    assert changed_settings(recorded) == {"seed": 7, "dropout": "2012", "epochs": 9}
    assert changed_settings({**recorded, "recipe": "gone.toml"}) == {}
