"""Top-1 and top-5 errors compared with numpy, and ten crops compared with the mean softmax."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.manifest import Class, read_manifest
from pipeline.spec import NetSpec
from trainer import checkpoint
from trainer.build import build_model
from trainer.evaluate import evaluate, evaluate_run, find_errors, load_trained, log_probabilities
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World
from trainer.run import Run, RunError
from trainer.settings import Settings, SettingsError

ALONE = World(0, 1, 0, torch.device("cpu"))


class Flat(nn.Module):
    """A net whose logits are a linear function of the pixels."""

    def __init__(self, pixels: int, classes: int):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(pixels, classes)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_errors_equal_those_of_numpy():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 20, generator=generator)
    labels = torch.randint(20, (500,), generator=generator)
    ranked = np.argsort(-scores.numpy(), axis=1)
    expected = [
        int((ranked[:, 0] != labels.numpy()).sum()),
        int((~(ranked[:, :5] == labels.numpy()[:, None]).any(1)).sum()),
    ]
    assert find_errors(scores, labels).sum(1).tolist() == expected


def test_the_top5_error_of_fewer_than_five_classes_is_zero():
    assert find_errors(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([0])).sum(1).tolist() == [1, 0]


def test_ten_crops_average_probabilities_and_not_logits():
    model, pixels = Flat(3 * 4 * 4, 7), 3 * torch.randn(5, 10, 3, 4, 4)
    logits = torch.stack([model(pixels[:, crop]) for crop in range(10)])
    averaged = log_probabilities(model, pixels).exp()
    torch.testing.assert_close(averaged, logits.softmax(2).mean(0))
    assert not torch.allclose(averaged, logits.mean(0).softmax(1), atol=1e-2)


def test_scores_do_not_depend_on_how_images_are_batched():
    model = Flat(3 * 4 * 4, 7)
    pixels, labels = torch.randn(23, 3, 4, 4), torch.randint(7, (23,))
    scores = [
        evaluate(model, "fp32", zip(pixels.split(n), labels.split(n), strict=True), ALONE, Metrics())
        for n in (23, 5, 1)
    ]
    for other in scores[1:]:
        assert other.images == 23
        assert other.top1_error == scores[0].top1_error
        assert other.top5_error == scores[0].top5_error
        assert abs(other.loss - scores[0].loss) < 1e-6
    assert model.training  # evaluation restores training mode


def test_no_batch_waits_for_the_device():
    class Waits(TorchDispatchMode):
        """Counts the values that are copied between Python and a device."""

        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.count += function.name() in {"aten::lift_fresh", "aten::_local_scalar_dense"}
            return function(*arguments, **(options or {}))

    def waits(batches: int) -> int:
        pixels, labels = torch.randn(12, 3, 4, 4), torch.randint(7, (12,))
        parts = list(zip(pixels.chunk(batches), labels.chunk(batches), strict=True))
        with Waits() as found:
            evaluate(Flat(3 * 4 * 4, 7), "fp32", parts, ALONE, Metrics())
        return found.count

    assert waits(1) == waits(6)


def test_any_dataset_has_the_nets_mean_subtracted_and_must_have_its_classes(packed, tmp_path):
    run, manifest = Run(tmp_path / "run"), read_manifest(packed)
    settings = Settings.model_validate({"data": packed, "crop": 64, "width": 0.25, "lrn": False})
    run.begin(settings, manifest).close()
    model = build_model(settings, len(manifest.classes), ALONE.device)
    checkpoint.write(run.checkpoints, 1, {"step": 1, "model": model.state_dict()}, keep=1)
    [(own, _)] = load_trained(settings, run, ALONE.device).batches("val", 1, ALONE)
    own, spec = own.clone(), NetSpec.read(run.folder)
    red, *others = spec.mean
    spec.model_copy(update={"mean": (red - 10, *others)}).write(run.folder)
    [(shifted, _)] = load_trained(settings, run, ALONE.device).batches("val", 1, ALONE)
    torch.testing.assert_close(shifted, own + torch.tensor([10.0, 0, 0]).view(3, 1, 1))
    classes = (*spec.classes[:-1], Class(id="another", name="another"))
    spec.model_copy(update={"classes": classes}).write(run.folder)
    with pytest.raises(SettingsError, match="trained on other classes"):
        load_trained(settings, run, ALONE.device)


def test_processes_that_find_different_checkpoints_do_not_add_up_their_results(whole, monkeypatch):
    """A run that is still training may save another one between their reads."""
    monkeypatch.setattr(World, "gather", lambda self, value: [value, value.replace("15", "20")])
    run = Run(whole)
    with pytest.raises(RunError, match="that of step 15; but another one is that of step 20"):
        evaluate_run(run.settings(), run, "val", 1)


def test_a_folder_for_the_details_that_cannot_be_made_is_found_before_the_evaluation(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setattr("trainer.evaluate.evaluate", pytest.fail)
    (tmp_path / "file").touch()
    run = Run(whole)
    with pytest.raises(FileExistsError):
        evaluate_run(run.settings(), run, "val", 1, out=tmp_path / "file")
