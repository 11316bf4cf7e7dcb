"""Defaults that are those of one kind of network, where `nampruner.config` has everybody's."""

YOLO = {
    "nam": "channel",
    "image_size": 640,
    "batch_size": 16,
    "workers": 8,
    "epochs": 100,
    "lr": 0.01,
    "momentum": 0.937,
    "label_smoothing": 0.0,
    "calibration": 128,
    "finetune_epochs": 25,
    "finetune_lr": 0.01,
}
"""What a network of Ultralytics takes where nothing is said: its training is another one."""
