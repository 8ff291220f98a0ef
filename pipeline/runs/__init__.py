"""Folders of runs: reading and writing. Imported by everything that trains, tracks, reports or evaluates.

folder.py       the files in `output_dir`; owner.py the process that may write there
resume.py       compatibility of a recipe with a saved run; finished.py finished runs; fork.py runs from another's checkpoint
checkpoints.py  storage of checkpoints: from a worker's folder to the run's, and back
export.py       the model, and folders that a user watches; sync.py copies them to remote storage
metrics.py      records of steps, appended line by line (jsonl.py)
events.py       events of a run, for its page; result.py its result, for the caller
scratch.py      temporary files of workers on their node's disk
"""
