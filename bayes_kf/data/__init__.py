"""Readers of data files, and the data of the demo, which need no network."""

from bayes_kf.data.arrays import array_data
from bayes_kf.data.corruption import CORRUPTIONS, corrupt
from bayes_kf.data.digits import LabelledImages, photo_patches, uci_digits, uci_digits_split
from bayes_kf.data.images import ImageFormat, image_folder_data
from bayes_kf.data.labels import LabelledData, encode_labels
from bayes_kf.data.open_dataset import open_dataset
from bayes_kf.data.predictions import SavedPredictions, read_predictions
from bayes_kf.data.supervised_text import supervised_text
from bayes_kf.data.text import text_data

__all__ = [
    "CORRUPTIONS",
    "ImageFormat",
    "LabelledData",
    "LabelledImages",
    "SavedPredictions",
    "array_data",
    "corrupt",
    "encode_labels",
    "image_folder_data",
    "open_dataset",
    "photo_patches",
    "read_predictions",
    "supervised_text",
    "text_data",
    "uci_digits",
    "uci_digits_split",
]
