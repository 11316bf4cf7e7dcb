"""What a data set of Ultralytics says of itself."""

from dataclasses import dataclass
from pathlib import Path

from nampruner.errors import NamPrunerError
from nampruner.yolo.library import check_cls_dataset, check_det_dataset, quiet


@dataclass(frozen=True)
class DataSet:
    """Labelled images: a data YAML, or for classification a folder."""

    source: str
    classes: tuple[str, ...]
    channels: int
    kpt_shape: tuple[int, ...] | None
    """Of a pose set: points, and 2 or 3 numbers each."""
    classify: bool
    """Whether an image has one label, and no boxes."""


def read_data(source: str | Path) -> DataSet:
    """Read a data YAML, or a folder with train/ and val/ of class folders. Nothing is downloaded.

    Raises:
        NamPrunerError: it is not there, or is neither.
    """
    classify = not str(source).endswith((".yaml", ".yml"))
    try:
        if "://" in str(source) or (classify and not (Path(source) / "train").is_dir()):
            raise FileNotFoundError("there is no such file or folder")
        with quiet():
            found = check_cls_dataset(source) if classify else check_det_dataset(source, False)
    except Exception as error:  # Ultralytics raises all kinds, and they say what is wrong
        raise NamPrunerError(
            f"data {str(source)!r} is none for YOLO: {str(error).splitlines()[0]}; give a data "
            "YAML whose images are there, or for classification a folder with train/ and val/"
        ) from error
    shape = found.get("kpt_shape")
    return DataSet(
        source=str(source),
        classes=tuple(str(found["names"][index]) for index in sorted(found["names"])),
        channels=int(found.get("channels", 3)),
        kpt_shape=tuple(int(number) for number in shape) if shape else None,
        classify=classify,
    )
