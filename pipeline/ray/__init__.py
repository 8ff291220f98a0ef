"""Ray's session, actor pools, tasks, channels within a node, and errors of running out of memory."""
