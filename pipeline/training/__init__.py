"""Stage 3: Ray Train runs the trainer on every worker.

driver.py    the run as a whole: what is checked and decided before workers start
following.py starting the workers, and what is shown and written while they work
worker.py    what each worker does
reporting.py from the trainer's callbacks to Ray and on to the driver
folder.py    what a run leaves in `output_dir`
"""
