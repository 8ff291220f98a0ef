"""Workers of a Ray that is started on this machine: forked from one process that has imported what they need.

Used on Linux without a GPU, where prefray starts Ray itself: a laptop, a CI machine, a notebook. There torch and transformers
are imported once, not once per worker, which is most of the time that a small run takes. Not used on a cluster, where Ray
starts the workers, nor on a machine with GPUs, whose drivers don't outlive a fork. Ray's own `preload_python_modules` doesn't
replace it: idle workers then import everything too, also for actors that need none of it, and workers with a runtime
environment aren't started ahead.

fork_server.py   imports the modules, and forks itself for each worker
fork_client.py   stands in for Python where Ray starts a worker: asks the server for a fork
worker_setup.py  does without the import of Ray that comes before each worker
"""
