"""Flags of other programs (Mammoth, Avalanche, PyCIL) that are typed here: what stands for them in this one."""

_SENTENCES = {
    "load_best_args": "Published values, if there are any, apply by default; --model_config default drops them.",
    "nowand wandb_name wandb_entity wandb_project": (
        "Use --log_to wandb; $WANDB_PROJECT and $WANDB_ENTITY say where to. Without it nothing is sent."
    ),
    "tensorboard": "TensorBoard's files are always written, in the run's folder. Drop it; --disable_log writes none.",
    "csv_log": (
        "Results are always written, as JSON in the run's folder; `flatcl report FOLDER --format csv` makes a table of "
        "many runs. Drop it."
    ),
    "savecheck save_checkpoint_mode": (
        "Checkpoints are always written, after each task and every --checkpoint_minutes; a finished run keeps its last "
        "one (--keep_checkpoint). Drop it."
    ),
    "loadcheck": "--resume RUN goes on with a run that was stopped; --from RUN --continue 1 goes on from its end.",
    "inference_only": (
        "A run trains and evaluates; accuracy.json in its folder has each task's accuracy after each task. Drop it."
    ),
    "enable_other_metrics ignore_other_metrics": (
        "All metrics (average accuracy, forgetting, backward and forward transfer) are always computed. Drop it."
    ),
    "eval_epochs": "Use --eval_every: epochs between evaluations inside a task.",
    "eval_future": "Use --eval_tasks all, which evaluates the tasks that are still to come, too.",
    "fitting_mode n_iters": "The length of a task is --n_epochs, or a share of --budget_rows. Use one of them.",
    "early_stopping_patience early_stopping_metric early_stopping_freq": "Use --early_stop.",
    "num_workers": (
        "No other processes load images: they are in memory, and many are augmented in one call. Drop it; --threads "
        "are the CPU threads of a run."
    ),
    "drop_last": "The last batch of an epoch is always kept, however small. Drop it.",
    "distributed": "Start one run in many processes by torchrun: torchrun --nproc_per_node 2 main.py ...",
    "dataset_config": "A benchmark has one set of defaults, and each flag overrides one of them. Drop it.",
    "code_optimization": "Use --amp bf16 for less precise and faster passes, --cuda_graph 1 for recorded steps.",
    "label_perc label_perc_by_class": "All training images have their labels. Drop it.",
    "noise_rate noise_type disable_noisy_labels_cache": "Labels are those of the data set, without noise. Drop it.",
    "transform_type": "A benchmark has one set of augmentations; --augmentation 0 turns them off.",
    "custom_task_order": "Tasks are cut out of the order of the classes: use --custom_class_order.",
    "force_compat": "A method that cannot learn a benchmark is refused. Drop it.",
    "opt_wd": "Use --optim_wd.",
    "opt_mom": "Use --optim_mom.",
    "config": "--from RUN repeats a run from its config.json; all else is given on the command line.",
    "memory_size mem_size memory_per_class": "Use --buffer_size: images in the whole memory.",
    "init_cls increment": "Use --classes_per_task, e.g. 50,10,10,10,10,10, or --n_tasks for equal tasks.",
    "convnet_type": "Use --backbone.",
    "model_name": "Use --model.",
    "shuffle": "Use --permute_classes, which orders the classes by the seed; batches are always drawn in random order.",
    "train_mb_size": "Use --batch_size.",
    "eval_mb_size": "An evaluation takes as many images at once as are handled best. Drop it.",
    "train_epochs": "Use --n_epochs.",
    "n_experiences": "Use --n_tasks.",
}
ELSEWHERE = {name: sentence for names, sentence in _SENTENCES.items() for name in names.split()}
