"""Records: their arithmetic and verdicts, their text, and the pages of the report."""

import numpy as np
import pytest

from tests.helpers import REPO
from tools.experiments.intervals import interval, paired_interval
from tools.experiments.markdown import section
from tools.experiments.record import Record, RecordError, Row, TrainedRun, Trial, Wrong
from tools.experiments.summary import anchor, report

RESULTS = REPO / "docs" / "results"
FIVE = [10.0, 11, 12, 13, 14]  # a base's errors; the interval of a difference is computed from the others
GAP, VAL, TRAIN = "gap (%)", "validation error (%)", "training error (%)"


def record(*rows: Row, **fields: object) -> Record:
    return Record(
        experiment="ablations",
        title="Ablations",
        source="section 3",
        data="drawn pictures",
        command="alexnet-train paper ablations",
        environment={"device": "CPU", "cpu": "486", "cores": "2"},
        rows=list(rows),
        **fields,
    )


def compared(differences: list[float], **fields: object) -> Record:
    """Return a record of two nets, the second of which has these differences from the first, seed by seed."""
    count = len(differences)
    errors = [base + more for base, more in zip(FIVE[:count], differences, strict=True)]
    whole = Row(system="AlexNet", measured={"error": FIVE[:count]})
    return record(whole, Row(system="no LRN", measured={"error": errors}, than="AlexNet", **fields))


def verdict(found: Record) -> str:
    return found.result(found.rows[1], "error").verdict


@pytest.mark.parametrize(
    ("differences", "expected"),
    [  # with five seeds, the interval is 1.24 standard deviations on either side of the mean
        ([1.0, 1.1, 0.9, 1.2, 0.8], "as published"),
        ([-1.0, -1.1, -0.9, -1.2, -0.8], "opposite"),
        ([0.1, 0.1, 0.1, 0.1, 3.0], "inconclusive: the interval includes 0"),  # though all seeds agree
        ([0.0, 0.0, 0.0, 0.0, 0.0], "inconclusive: the interval includes 0"),
        ([1.0, 1.1, 0.9, 1.2], "fewer than five seeds"),
        ([1.0], "fewer than five seeds"),
    ],
)
def test_a_verdict_needs_five_seeds_and_an_interval_on_one_side_of_zero(differences, expected):
    assert verdict(compared(differences, published={"error": 1.4})) == expected
    assert verdict(compared(differences, signs={"error": 1})) == expected
    assert verdict(compared(differences)) == ""


def test_differences_are_between_runs_of_the_same_seed():
    found = compared([1.0, 3.0, 2.0], published={"error": 1.4}, note="section 3.3")
    _, low, high = interval([1.0, 3.0, 2.0])
    cells = f"+1.4 vs. AlexNet | 13.00 (11.00 to 14.00) | +2.00 | {low:+.2f} to {high:+.2f}"
    assert f"| no LRN (section 3.3) | error | {cells} | fewer than five seeds |" in section(found)
    signed = compared([1.0], signs={"error": -1})
    assert "| no LRN | error | lower than AlexNet | 11.00 | +1.00 |  | fewer than" in section(signed)


@pytest.mark.parametrize("images", [1, 8, 13])
def test_the_errors_of_images_survive_as_bits(images, tmp_path):
    wrong = np.random.default_rng(0).random((5, images)) < 0.4
    row = Row(system="AlexNet", wrong={"error": Wrong.of(list(wrong))})
    [read] = Record.read(record(row).save(tmp_path)).rows
    np.testing.assert_array_equal(read.table("error"), 100 * wrong)
    assert read.values("error") == pytest.approx((100 * wrong.mean(1)).tolist())


def test_differences_of_images_have_an_interval_over_seeds_and_images():
    wrong = np.random.default_rng(0).random((2, 5, 40)) < 0.4
    whole, less = (Row(system=str(net), wrong={"error": Wrong.of(list(wrong[net]))}) for net in range(2))
    found = record(whole, less.model_copy(update={"than": "0"}))
    result = found.result(found.rows[1], "error")
    assert result.interval == paired_interval(100.0 * wrong[1] - 100.0 * wrong[0])
    assert result.mean == pytest.approx(100 * (wrong[1].mean() - wrong[0].mean()))


def test_one_net_is_compared_with_each_of_several():
    base = Row(system="1 CNN", measured={"error": [30.0, 32.0]})
    found = record(base, Row(system="2 CNNs", measured={"error": [29.0]}, than="1 CNN"))
    assert found.result(found.rows[1], "error").table.tolist() == [[-1], [-3]]


def test_a_gap_is_the_difference_of_two_measures():
    wrong = [np.array([True, False, True, False]), np.array([True, True, True, False])]
    row = Row(
        system="AlexNet",
        wrong={VAL: Wrong.of(wrong)},
        measured={TRAIN: [20.0, 10.0]},
        gaps={GAP: (VAL, TRAIN)},
    )
    assert row.measures == [VAL, TRAIN, GAP]
    assert row.values(GAP) == [50 - 20, 75 - 10]


def test_a_measure_that_only_one_of_two_nets_has_is_not_compared():
    row = Row(system="tanh", measured={"epochs": [9.0]}, than="AlexNet", published={"epochs": 3})
    assert record(Row(system="AlexNet"), row).result(row, "epochs").verdict == ""


def test_a_record_reads_back_and_other_files_are_refused(tmp_path):
    shorter = TrainedRun(name="AlexNet-1", seed=1, settings={}, minutes=30)
    written = record(
        Row(system="AlexNet", measured={"error (%)": [40.0]}),
        sweep=[Trial(system="AlexNet", rate=0.1, error=None), Trial(system="AlexNet", rate=0.01, error=30.5)],
        runs=[TrainedRun(name="AlexNet-0", seed=0, settings={"lrn": False}, minutes=90), shorter],
        settings={"epochs": 36},
        dataset={"size": 128},
    )
    path = written.save(tmp_path)
    assert Record.read(path) == written
    text = section(written)
    assert "| system | 0.01 | 0.1 |\n| --- | --- | --- |\n| AlexNet | **30.50** | diverged |" in text
    assert "Training took 30.0 to 90.0 minutes a run, and 2.0 hours in all." in text
    assert "Training took 30.0 minutes." in section(record(runs=[shorter]))
    assert "not the defaults: epochs 36." in text
    assert "The dataset: size 128." in text
    path.write_text('{"rows": []}')
    with pytest.raises(RecordError, match=r"ablations.json is not a record"):
        Record.read(path)


def test_the_first_page_lists_claims_machines_and_notes(tmp_path):
    found = compared(
        [1.0, 1.1, 0.9, 1.2, 0.8], published={"error": 1.4}, claims={"error": "LRN lowers the error (3.3)"}
    )
    (tmp_path / "photos").mkdir()
    found.save(tmp_path / "photos")
    (tmp_path / "photos" / "notes.md").write_text("Not reached: 24 %.\n")
    pages = report(tmp_path)
    assert list(pages) == [tmp_path / "README.md", tmp_path / "photos" / "results.md"]
    first = pages[tmp_path / "README.md"]
    assert "| LRN lowers the error (3.3): error | +1.4 vs. AlexNet | +1.00 | +0.80 to +1.20 |" in first
    assert "| as published | [Ablations](photos/results.md#ablations) |" in first
    assert "## photos" in first
    assert first.endswith("Measured on 2 cores (486).\n\nNot reached: 24 %.\n")


def test_a_claim_whose_measure_a_net_did_not_reach_is_listed(tmp_path):
    row = Row(
        system="tanh", than="AlexNet", claims={"epochs": "With tanh, slower (3.1)"}, signs={"epochs": 1}
    )
    record(Row(system="AlexNet", measured={"epochs": FIVE}), row).save(tmp_path)
    first = report(tmp_path)[tmp_path / "README.md"]
    assert (
        "| With tanh, slower (3.1): epochs | higher than AlexNet |  |  | not reached, see the details |"
        in first
    )


@pytest.mark.parametrize(
    ("title", "expected"),
    [("Fig. 1: ReLU against tanh", "fig-1-relu-against-tanh"), ("CNN*", "cnn"), ("Two GPUs", "two-gpus")],
)
def test_links_lead_to_headings_as_github_names_them(title, expected):
    assert anchor(title) == expected


def test_the_committed_pages_are_those_of_the_committed_records():
    pages = report(RESULTS)
    assert len(pages) > 2
    for path, text in pages.items():
        assert path.read_bytes() == text.encode(), (
            f"{path}: run alexnet-train paper report --out docs/results"
        )


def test_a_row_that_is_compared_with_none_is_named():
    found = record(Row(system="tanh", than="AlexNet", measured={"error": [1.0]}))
    with pytest.raises(RecordError, match=r"no row 'AlexNet': run the experiment again"):
        found.result(found.rows[0], "error")
