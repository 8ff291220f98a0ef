"""`make demo`: the main job on the embedded default, and an honest answer to "did it work?"."""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import time
from pathlib import Path

from pipeline.demo.preferences import OPENING, held_out_prompts, write_preferences

SHOWN = 6
NEW_TOKENS = 40


def main() -> int:
    """Write the data, train, generate answers to held-out prompts with and without the adapter, compare; return the status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo", description=__doc__)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts to answer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    options = parser.parse_args()

    # After the arguments are parsed, so that --help doesn't wait for imports.
    from pipeline.cli import quiet_libraries

    quiet_libraries()
    from pipeline import SamplingOptions, generate, load_config, train
    from pipeline.demo.report import Comparison
    from pipeline.ui.console import open_console
    from pipeline.ui.display import open_display

    start = time.monotonic()
    write_preferences(Path("prefray-demo/data"))
    recipe = importlib.resources.files("pipeline") / "recipes" / "quickstart.yaml"
    cfg = load_config(str(recipe), [f"output_dir={_next_run()}", *options.set])
    prompts = held_out_prompts()[: options.prompts]
    display = open_display()
    display.note(f"The preference: an answer opens with {OPENING!r}. {len(prompts)} held-out prompts measure it.")
    result = train(cfg, display=display)
    greedy = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0.0)
    answers = generate(str(result.run_dir), prompts, options=greedy, display=display)
    display.close()
    comparison = Comparison(answers, SHOWN, time.monotonic() - start)
    open_console().print(result, comparison)
    # `make demo` fails if training hasn't worked.
    return 0 if comparison.improved else 1


def _next_run() -> str:
    """Return an unused run folder, so that the demo can be run again."""
    number = 1
    while Path(f"prefray-demo/run-{number}").exists():
        number += 1
    return f"prefray-demo/run-{number}"


if __name__ == "__main__":
    sys.exit(main())
