"""Keys of the training loop: batches, cadence, selection, tracking, hub."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from strategies.keys import Keys, key

__all__ = [
    "CALLBACK_ARGUMENTS",
    "CALLBACK_VARIABLES",
    "HubKeys",
    "PluginKeys",
    "ProfileKeys",
    "TRACKER_SWITCHES",
    "TrackerKeys",
    "TrainerKeys",
]


class PluginKeys(Keys):
    """Plugins of the user."""

    plugins: list[str] | None = key(
        "Modules, also of the current directory, that register losses, strategies, dataset types or callbacks."
    )


class ProfileKeys(Keys):
    """A trace of some steps."""

    steps: tuple[PositiveInt, PositiveInt] = Field(
        description="First and last step of the trace, from 1. It holds every operation, megabytes for each step."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, last = self.steps
        if first > last:
            raise ValueError(f"steps: the first step {first} is after the last one {last}; write [{last}, {first}]")
        if last - first >= MOST_PROFILED:
            raise ValueError(
                f"steps: {last - first + 1} steps are too many for one trace; give at most {MOST_PROFILED}, "
                f"such as [{first}, {first + 3}]"
            )
        return self


MOST_PROFILED = 50
"""Steps of a trace, which no viewer opens if it is much longer."""


# YAML reads a bare `no` as false.
_BareNo = BeforeValidator(lambda value: "no" if value is False else value)
Cadence = Annotated[Literal["no", "steps", "epoch"], _BareNo]
SaveCadence = Annotated[Literal["no", "steps", "epoch", "best"], _BareNo]
StepsOrPart = PositiveInt | Annotated[float, Field(gt=0, lt=1)]


class TrainerKeys(Keys):
    """Batch sizes, lengths, epochs, and when to log, evaluate, save and stop."""

    micro_batch_size: PositiveInt = key(
        "Rows per forward and worker (grpo: completions). Forwards of packed pairs are filled by tokens_per_forward instead; "
        "then this only sets the global batch.",
        1,
    )
    gradient_accumulation_steps: PositiveInt = key(
        "Forwards per optimizer step. Global batch = micro_batch_size x this x workers.", 1
    )
    eval_batch_size: PositiveInt | None = key(
        "Rows per evaluation forward and worker; micro_batch_size when not set (grpo: whole groups of trl.num_generations)."
    )
    sequence_len: PositiveInt = key("Maximum tokens of prompt + completion, special tokens included.", 1024)
    num_epochs: PositiveFloat = key("Passes over the training rows.", 1.0)
    max_steps: PositiveInt | None = key("Stop after this many optimizer steps, regardless of num_epochs.")
    seed: NonNegativeInt = key("Seed of the data order, the split (unless split_seed is set), dropout and new weights.", 42)
    full_determinism: bool = key("Deterministic kernels only; slower.", False)
    pad_to_multiple_of: PositiveInt | None = key("Pad batches to a multiple of this many tokens.")
    dataloader_num_workers: NonNegativeInt | None = key("Processes that collate batches.")
    dataloader_pin_memory: bool | None = key("Pin host memory for copies to the GPU.")
    dataloader_prefetch_factor: PositiveInt | None = key("Batches that each collating process prefetches.")
    dataloader_drop_last: bool = key("Drop a last batch that is not full (of pairs: the last global batch of an epoch).", False)
    ddp_timeout: PositiveInt | None = key("Timeout of collectives in seconds.")
    ddp_find_unused_parameters: bool | None = key("Let DDP look for parameters without gradients.")
    torch_empty_cache_steps: PositiveInt | None = key("Steps between emptying the GPU's cache.")
    logging_steps: PositiveInt | None = key("Steps between logs; when not set 1/200 of all steps, 1 to 10.")
    logging_nan_inf_filter: bool | None = key("Exclude non-finite losses from the logged mean; they are included when not set.")
    include_tokens_per_second: bool | None = key("Log tokens per second and device from transformers' own count.")
    nonfinite_loss: Literal["stop", "skip"] = key(
        "At a step whose loss or gradient norm is not finite: `stop` ends the run before the step and names the rows; `skip` "
        "leaves weights and moments unchanged, continues with the next batch, and counts it in skipped_steps.",
        "stop",
    )
    eval_strategy: Cadence | None = key("When to evaluate; follows eval_steps and evals_per_epoch when not set.")
    eval_steps: StepsOrPart | None = key("Steps between evaluations; below 1, a fraction of all steps.")
    evals_per_epoch: PositiveInt | None = key("Evaluations per epoch.")
    eval_on_start: bool = key("Evaluate before the first step.", False)
    save_strategy: SaveCadence | None = key("When to save; each epoch when nothing is set.")
    save_steps: StepsOrPart | None = key("Steps between checkpoints; below 1, a fraction of all steps.")
    saves_per_epoch: PositiveInt | None = key("Checkpoints per epoch.")
    save_total_limit: PositiveInt = key("Checkpoints to keep, including the latest and the best.", 4)
    save_only_model: bool = key("Save no optimizer state: such a checkpoint can't be resumed.", False)
    early_stopping_patience: PositiveInt | None = key("Stop after this many evaluations without a better metric.")
    load_best_model_at_end: bool | None = key("End with the best checkpoint's weights instead of the last.")
    metric_for_best_model: str | None = key("Metric that selects the best checkpoint; eval_rewards/accuracies when not set.")
    greater_is_better: bool | None = key("Whether a greater metric is better; false for losses when not set.")
    profile: ProfileKeys | None = key(
        "Write a torch profiler trace of these steps, per rank, into the folder profiles of output_dir: {steps: [3, 6]}."
    )
    output_dir: str = key(
        "Folder of the run: config, metrics, checkpoints, model. On Ray also a URI, such as s3://bucket/run.", "./model-out"
    )


class TrackerKeys(Keys):
    """Experiment trackers; one run reports once, whatever its number of workers. `use_NAME` is `pipeline/tracking/NAME.py`."""

    use_tensorboard: bool | None = key("Write TensorBoard event files, into the run's folder.")
    use_wandb: bool | None = key("Report to Weights & Biases; true where wandb_project is set.")
    wandb_project: str | None = key("W&B project.")
    wandb_entity: str | None = key("W&B user or team.")
    wandb_name: str | None = key("W&B run name, and group of a sweep; the last part of output_dir when not set.")
    wandb_run_id: str | None = key("W&B run id, to continue a run.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = key("W&B mode.")
    wandb_watch: str | None = key("What W&B watches: gradients, parameters, all, false; without Ray only.")
    wandb_log_model: Literal["false", "end", "checkpoint"] | None = key(
        "What W&B stores as artifacts: false, end (the model), checkpoint (each one too)."
    )
    use_mlflow: bool | None = key("Report to MLflow; true where mlflow_experiment_name is set.")
    mlflow_tracking_uri: str | None = key("MLflow server or store; MLFLOW_TRACKING_URI when not set.")
    mlflow_experiment_name: str | None = key("MLflow experiment.")
    mlflow_run_name: str | None = key("MLflow run name; the last part of output_dir when not set.")
    hf_mlflow_log_artifacts: bool | None = key("Copy checkpoints to MLflow.")
    use_trackio: bool | None = key("Report to trackio; true where trackio_project_name is set.")
    trackio_project_name: str | None = key("trackio project.")
    trackio_run_name: str | None = key("trackio run name, and group of a sweep; the last part of output_dir when not set.")
    trackio_space_id: str | None = key("Space that shows the trackio project.")


TRACKER_SWITCHES = {"wandb": "wandb_project", "mlflow": "mlflow_experiment_name", "trackio": "trackio_project_name"}
"""Tracker -> the key that also enables it, as in Axolotl, if `use_NAME` isn't set."""
CALLBACK_ARGUMENTS = {
    "wandb_name": "run_name",
    "mlflow_run_name": "run_name",
    "trackio_run_name": "run_name",
    "trackio_project_name": "project",
    "trackio_space_id": "trackio_space_id",
}
"""Key -> argument of transformers' trainer; the first key that is set wins."""
CALLBACK_VARIABLES = (
    *("wandb_project", "wandb_entity", "wandb_run_id", "wandb_mode", "wandb_watch", "wandb_log_model"),
    *("mlflow_tracking_uri", "mlflow_experiment_name", "hf_mlflow_log_artifacts"),
)
"""Keys that transformers' callbacks read only from environment variables of the same name in capitals."""


class HubKeys(Keys):
    """Where to push the result."""

    hub_model_id: str | None = key("Hub repository that receives the model; nothing is pushed when not set.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None = key("When to push.")
    hub_revision: str | None = key("Branch to push to.")
    hub_private_repo: bool | None = key("Make the repository private; true when not set.")


class AcceleratorKeys(Keys):
    """Arguments passed to accelerate unchanged."""

    accelerator_config: dict[str, Any] | None = key("Arguments of accelerate's AcceleratorConfig.")
