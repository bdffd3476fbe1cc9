"""Small trained nets and the data they were trained on, inside the package: nothing is downloaded.

`model("glyph-resnet20")` is a trained net, `data("glyph", "test")` its pictures and labels.
"""

from allot.sources.zoo._catalogue import DATASETS, MODELS, SPLITS, DataSet, TrainedNet, data, model

__all__ = ["DATASETS", "MODELS", "SPLITS", "DataSet", "TrainedNet", "data", "model"]
