"""Stage 3: Ray Train runs the trainer on every worker.

driver.py      the run as a whole: what is checked and decided before workers start
following.py   starting the workers, and what is shown and written while they work
worker.py      what each worker does
reporting.py   from the trainer's callbacks to Ray's controller; relaying.py from there to the driver
checkpoints.py between a worker's folder and the run's storage; artifacts.py the model, and folders that a person watches
pulse.py       signs of life of a worker; watching.py who gives none; stopping.py what SIGTERM asks for
folder.py      what a run leaves in `output_dir`; continuation.py whether a recipe goes on with it
history.py     what happens to a run, for its page
metrics.py     records of steps, written line by line (lines.py); ledger.py which rows they were taken on
"""
