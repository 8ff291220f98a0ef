"""TRL's trainers with our rows, losses, mixins and logs: one per kind of row.

pair.py       pairs; planned.py runs the steps of the batch plan, pair_step.py sums over their pairs
kto.py        labelled completions
grpo.py       prompts
base.py       shared: mixins of `strategies/mixins/`, evaluation, the model card
start.py      check that the policy starts at its reference
arguments.py  the dataclasses of their arguments

Methods of transformers' Trainer and TRL's trainers that are overridden, in the order in which a run calls them:

    when made    _send_telemetry                              base        none is sent
                 create_accelerator_and_postprocess           distributed FSDP2 on CPUs too
                 _prepare_dataset                             base, kto   prepared rows are taken as they are
    train        train                                        base, checkpoint, step_guard  refuses damaged checkpoints
                 get_train_dataloader                         planned     the batch plan's loader
                 _get_dataloader, _get_train_sampler          kto, grpo   rows in the order of the seed
                 _init_training_state                         metrics, reference, grpo  sums, reference, generations
                 get_total_train_batch_size                   planned     that of the plan
                 _prepare_for_training                        checkpoint, distributed  state from the checkpoint's shards
                 create_optimizer, create_scheduler           optimizer, scheduler
                 _load_from_checkpoint                        checkpoint  weights that files name otherwise
                 _load_callback_state, _load_rng_state        ending, rng
    each epoch   _run_epoch                                   metrics, ending
    each step    get_batch_samples                            planned, kto, metrics  all batches of the step
                 training_step                                pair, planned, kto, step_guard, metrics  forwards and backwards
                 compute_loss                                 metrics     the backward's time begins after it
                 _prepare_inputs                              grpo        the time of generating
                 _compute_loss                                kto
                 _generate_and_score_completions              grpo        the stored generation when resumed within it
                 floating_point_ops, _track_num_input_tokens  planned
                 _get_grad_norm                               step_guard  decides whether the optimizer steps
    after it     _maybe_log_save_evaluate                     step_guard  stops on all ranks at once
                 log                                          metrics, grpo  one record from all ranks
    evaluation   get_eval_dataloader, get_test_dataloader     planned
                 _get_eval_sampler                            kto
                 evaluation_loop, prediction_step             base, planned
    checkpoint   _save_checkpoint                             checkpoint, reference, step_guard
                 save_model, _save                            checkpoint, distributed
                 _save_optimizer_and_scheduler                checkpoint  the schedule; states are in the shards
                 _save_rng_state                              grpo        and the generation
    at the end   _load_best_model                             checkpoint
                 create_model_card                            base

Private names of theirs that are used beside those:

    _buffered_inputs, _step                    grpo        completions of the generation batch; forwards until now
    _created_lr_scheduler                      scheduler   set with a schedule that transformers doesn't know
    _get_learning_rate                         planned     LOMO's backward takes it
    _get_output_dir                            checkpoint, reference  of a hyperparameter search's trial too
    _get_per_token_logps_and_entropies         grpo        of the policy, compared with the reference's at the start
    _globalstep_last_logged, _tr_loss          metrics     what isn't logged yet stands in the checkpoint
    _last_world_entropy                        grpo        of `use_adaptive_entropy`, when resumed
    _load_scaler                               checkpoint  when resumed, after all other state
    _metrics, _total_train_tokens, _tp_size    metrics, grpo  TRL's sums, made those of all ranks
    _name, _tag_names                          base        the strategy, and tags of the model card
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.trainers.arguments import AxolotlDPOConfig, AxolotlGRPOConfig, AxolotlKTOConfig
    from strategies.trainers.grpo import AxolotlGRPOTrainer
    from strategies.trainers.kto import AxolotlKTOTrainer
    from strategies.trainers.pair import AxolotlDPOTrainer
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.trainers.arguments": "AxolotlDPOConfig AxolotlGRPOConfig AxolotlKTOConfig",
            "strategies.trainers.grpo": "AxolotlGRPOTrainer",
            "strategies.trainers.kto": "AxolotlKTOTrainer",
            "strategies.trainers.pair": "AxolotlDPOTrainer",
        },
    )

__all__ = [
    "AxolotlDPOConfig",
    "AxolotlDPOTrainer",
    "AxolotlGRPOConfig",
    "AxolotlGRPOTrainer",
    "AxolotlKTOConfig",
    "AxolotlKTOTrainer",
]
