"""Several runs in one command: those that can share a base train in slots of hosts, others with workers of their own.

Preparing, scoring, and what follows on training are done in the calling thread, for one run after another. Only training has
threads, one for each run.

driver.py    the command as a whole: checks all recipes, prepares all runs, trains them; rules.py which can't be run together
run.py       one of the runs, from its preparation to its end
jobs.py      the thread of a run with workers of its own, or of runs that share a base
schedule.py  which runs share a base, when each begins, and how all end
display.py   the table of the runs
"""
