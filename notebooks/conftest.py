"""The YOLO notebook needs the extra `nampruner[yolo]`; without it, it is not collected."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("ultralytics") else ["3-yolo.ipynb"]
