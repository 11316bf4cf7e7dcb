"""The story: train → prune → recover → fine-tune → export → report.

task.py     what sets one kind of network apart: classifiers.py, yolo.py
job.py      what every stage works with
stages.py   what makes a checkpoint: train, prune, finetune
exporting.py  one checkpoint as a file, and its proof
publish.py  what comes after the last one: times, figures, report
int8.py     INT8 export, beside float
look.py     what touches nothing: rank, evaluate, bench
whole.py    all of it in one resumable walk
folders.py  where things go, and whose they are
"""

from nampruner.pipeline.whole import run

__all__ = ["run"]
