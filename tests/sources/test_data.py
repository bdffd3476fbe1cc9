"""DATA on the command line: folders of pictures, arrays, the zoo, factories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from allot import UsageError
from allot.sources import zoo
from allot.sources.load import ModelSource, load_data
from cli.command import MLP, NET, SAMPLES, done, refused


@pytest.mark.parametrize("split", zoo.SPLITS)
def test_zoo_data_come_in_splits_by_the_name_of_data_or_net(split):
    by_net, by_name = load_data(NET, split=split), load_data("zoo:digits", split=split)
    assert torch.equal(by_net.tensors[0], by_name.tensors[0]) and len(by_net) > 500


# Arrays


def arrays(**given: np.ndarray) -> str:
    np.savez("a.npz", **given)
    return "npz:a.npz"


X, Y = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32), np.arange(20) % 4


@pytest.mark.parametrize("name", ["y", "label", "labels", "target", "targets"])
@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_arrays_are_inputs_and_labels(name, kind):
    data = load_data(arrays(x=X, **{name: Y.astype(kind)}))
    assert len(data) == 20
    inputs, label = data[3]
    assert torch.equal(inputs, torch.from_numpy(X[3])) and int(label) == 3
    assert done(f"evaluate {MLP} --data npz:a.npz --json").json["samples"] == 20


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_arrays_come_to_the_type_of_the_model(kind):
    spec = arrays(x=X.astype(kind), y=Y[:, None])
    done(f"prune {MLP} --data {spec} --test {spec} --budget sparsity=0.5 --method erk --out RUN")


def test_several_arrays_are_inputs_by_name():
    inputs, label = load_data(arrays(ids=np.arange(12).reshape(4, 3), mask=np.ones((4, 3)), y=np.arange(4)))[2]
    assert inputs["ids"].tolist() == [6, 7, 8] and inputs.keys() == {"ids", "mask"} and int(label) == 2


def test_arrays_without_labels_calibrate_and_do_not_score():
    spec = arrays(x=X)
    done(f"prune {MLP} --data {spec} --budget sparsity=0.5 --method erk --out RUN")
    assert "labels" in refused(f"evaluate RUN --model {MLP} --data {spec}")


@pytest.mark.parametrize("labels", [Y + 0.5, np.eye(4)[Y], np.eye(4, dtype=int)[Y]])
def test_labels_that_are_no_whole_numbers_calibrate_and_do_not_score(labels):
    spec = arrays(x=X, y=labels)
    done(f"prune {MLP} --data {spec} --budget sparsity=0.5 --method erk --out RUN")
    assert "labels" in refused(f"evaluate RUN --model {MLP} --data {spec}")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": np.array([{}, 1], dtype=object)}, "plain arrays"),
        ({"x": np.array(["a", "b"])}, "plain arrays"),
        ({"x": X, "y": Y[:3]}, "one length"),
        ({"x": X, "mask": X[:3]}, "one length"),
        ({"x": np.float32(3)}, "one length"),
        ({"y": Y}, "x"),
        ({}, "x"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        ({"x": X[:, :5]}, "[1, 5]"),
        ({"x": X * np.nan}, "nan"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(given, told):
    assert told in refused(f"prune {MLP} --data {arrays(**given)} --budget sparsity=0.5 --method erk --out RUN")
    assert not Path("RUN").exists()


def test_files_that_are_no_arrays_are_refused():
    arrays(x=X)
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:100])
    np.save("one.npy", X)
    for name, told in [("cut.npz", "plain arrays"), ("one.npy", "one array"), ("none.npz", "no such file"), (".", ".")]:
        assert told in refused(f"prune {MLP} --data npz:{name} --budget sparsity=0.5 --method erk --out RUN")


# Folders


def folder(mode: str, size: tuple[int, int] = (20, 24)) -> str:
    image = pytest.importorskip("PIL.Image")
    for label, shade in enumerate((40, 200)):
        Path(f"pictures/class {label}").mkdir(parents=True)
        for number in range(3):
            shades = np.full((*size, 3) if mode == "RGB" else size, shade + number, dtype=np.uint8)
            image.fromarray(shades).save(f"pictures/class {label}/{number}.png")
    return "folder:pictures"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_pictures_come_in_the_size_and_channels_of_the_model(mode, channels):
    source = ModelSource(torch.nn.Identity(), torch.zeros(1, channels, 16, 16))
    data = load_data(folder(mode), source)
    assert len(data) == 6
    picture, label = data[5]
    assert picture.shape == (channels, 16, 16) and label == 1
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.449,), (0.226,))
    expected = [(202 / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    assert picture.mean((1, 2)).tolist() == pytest.approx(expected, abs=0.01)


def test_folders_keep_the_proportions_that_a_wide_model_wants():
    data = load_data(folder("RGB"), ModelSource(torch.nn.Identity(), torch.zeros(1, 3, 16, 48)))
    assert data[0][0].shape == (3, 16, 48) and float(data[0][0].std()) < 1  # no black border


def test_folders_serve_to_calibrate_and_to_score():
    line = f"prune cli.factories:conv --input 3,16,16 --data {folder('RGB')} --test folder:pictures"
    said = done(f"{line} --budget sparsity=0.5 --out RUN --json").json
    assert said["scores"]["samples"] == 6
    assert done("evaluate RUN --model cli.factories:conv --json").json["score"] == said["scores"]["sparse"]


def test_folders_that_cannot_be_used_are_refused():
    Path("bare/class").mkdir(parents=True)
    line = "prune cli.factories:conv --input 3,16,16 --budget sparsity=0.5 --out RUN --data"
    assert "no such folder" in refused(f"{line} folder:none")
    refused(f"{line} folder:bare")
    Path("bare/class/x.png").write_text("no picture")
    assert "x.png" in refused(f"{line} folder:bare")
    assert "--input" in refused(f"prune {MLP} --budget sparsity=0.5 --out RUN --data {folder('L')}")


# Factories


def test_factories_are_found_in_modules_and_in_files():
    Path("mine.py").write_text("import torch\n\ndef data():\n    return torch.zeros(5, 6)\n")
    for spec in ("mine.py:data", "./mine.py:data", "mine:data", f"{Path.cwd()}/mine.py:data"):
        assert load_data(spec).shape == (5, 6)
    assert len(load_data(SAMPLES)) == 40


def test_a_factory_that_returns_something_else_is_refused():
    Path("mine2.py").write_text("def data():\n    return 3\n")
    with pytest.raises(UsageError, match="returned int: a Dataset or an iterable is accepted"):
        load_data("mine2.py:data")
