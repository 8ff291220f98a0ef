"""Where a run lives: workers, resources, preflight. Imports neither torch nor pipeline nor strategies."""
