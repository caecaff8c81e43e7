"""What the flags and keys of other tools are called here."""

from collections.abc import Collection, Iterable

# What jlora calls the keys that these tools share.
NAMES = {
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "warmup_ratio": "optim.warmup_ratio",
    "max_grad_norm": "optim.max_grad_norm",
    "lr_scheduler": "optim.lr_schedule",
    "lr_scheduler_type": "optim.lr_schedule",
    "adam_beta1": "optim.adam_b1",
    "adam_beta2": "optim.adam_b2",
    "adam_epsilon": "optim.adam_eps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "max_steps": "train.max_steps",
    "num_epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_checkpointing": "compute.remat",
    "bf16": "compute.dtype",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "peft_use_dora": "lora.use_dora",
    "use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "use_rslora": "lora.use_rslora",
    "loraplus_lr_ratio": "optim.loraplus_lr_ratio",
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "lora_model_dir": "init_adapter",
    "adapter_name_or_path": "init_adapter",
    "load_in_4bit": "compute.base_dtype",
    "load_in_8bit": "compute.base_dtype",
    "quantization_bit": "compute.base_dtype",
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "test_datasets": "data.eval",
    "eval_dataset": "data.eval",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "sequence_len": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "sample_packing": "data.packing",
    "packing": "data.packing",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "dataset_prepared_path": "data.cache_dir",
    "lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "warmup": "optim.warmup_steps",
    "min_lr_rate": "optim.min_lr_ratio",
    "cosine_min_lr_ratio": "optim.min_lr_ratio",
    "warmup_steps": "optim.warmup_steps",
    "epochs": "train.num_epochs",
    "iters": "train.max_steps",
    "steps": "train.max_steps",
    "grad_accum": "train.grad_accum_steps",
    "grad_accumulation_steps": "train.grad_accum_steps",
    "steps_per_report": "train.log_every",
    "steps_per_eval": "train.eval_every",
    "save_total_limit": "train.keep",
    "load_best_model_at_end": "train.keep_best",
    "early_stopping": "train.early_stopping_patience",
    "grad_checkpoint": "compute.remat",
    "fp16": "compute.dtype",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "target_modules": "lora.target_modules",
    "resume_adapter_file": "init_adapter",
    "data": "data.train",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "max_seq_len": "data.seq_len",
    "seq_length": "data.seq_len",
    "mask_prompt": "data.train_on",
    "train_on_completions": "data.train_on",
    "out": "output_dir",
    "optimizer": "optim.optimizer",
    "random_state": "seed",
    "data_seed": "seed",
    "optim": "optim.optimizer",
    "scheduler": "optim.lr_schedule",
    "beta1": "optim.adam_b1",
    "beta2": "optim.adam_b2",
    "use_gradient_checkpointing": "compute.remat",
    "attn_implementation": "compute.attention",
    "flash_attention": "compute.attention",
    "torch_dtype": "compute.dtype",
    "block_size": "data.seq_len",
    "dataset_text_field": "data.fields",
    "dataset_path": "data.train",
    "train_on_responses_only": "data.train_on",
    "resume_from_checkpoint": "resume",
    "adapter_path": "output_dir",
    "max_iters": "train.max_steps",
    "save_strategy": "train.save_every",
    "eval_strategy": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "layers": "lora.layers_to_transform",
    "num_layers": "lora.layers_to_transform",
    "report_to": "report.to",
    "wandb_project": "report.project",
}
# The same of the other commands.
_OTHERS = {
    "temp": "temperature",
    "n": "num_return_sequences",
    "num_samples": "num_return_sequences",
    "repeat_penalty": "repetition_penalty",
    "system_prompt": "system",
    "stop": "stop_strings",
    "ctx_size": "context",
    "max_model_len": "context",
    "lora_modules": "adapter",
    "outtype": "type",
    "q_bits": "quantize",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "adapter_path": "adapter",
    "lora_path": "adapter",
    "peft": "adapter",
}
# Keys that only this tool has; two of them tell it.
_SIGNS = {
    "Axolotl": {
        *("base_model", "micro_batch_size", "val_set_size", "sequence_len"),
        *("sample_packing", "lora_target_linear", "dataset_prepared_path", "adapter"),
    },
    "LLaMA-Factory": {
        *("finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target"),
        *("template", "do_train", "dataset_dir"),
    },
    "TRL or Transformers": {
        *(
            "model_name_or_path",
            "dataset_name",
            "use_peft",
            "per_device_train_batch_size",
        ),
        *(
            "lora_target_modules",
            "num_train_epochs",
            "max_seq_length",
            "lora_task_type",
        ),
    },
}


def name_here(name: str, known: Collection[str]) -> str | None:
    """Returns the flag of a command that another tool calls `name`, if it has one.

    Args:
        name: with dashes or underscores.
        known: the command's flags; a command may have them without their groups.
    """
    plain = name.replace("-", "_").rpartition(".")[2]
    names = [n for n in (NAMES.get(plain), _OTHERS.get(plain)) if n]
    ours = [*names, *(name.rpartition(".")[2] for name in names)]
    return next((name for name in ours if name in known), None)


def foreign_keys(unknown: Iterable[str], known: Iterable[str]) -> str | None:
    """Returns what to say of a file with these unknown keys, None if it is of no other tool.

    Args:
        unknown: the file's keys, those below others with dots.
        known: jlora's keys.
    """
    keys = [key.split(".")[0] for key in unknown]
    keys = list(dict.fromkeys(keys))
    found = {tool: len(signs.intersection(keys)) for tool, signs in _SIGNS.items()}
    tool = max(found, key=lambda name: found[name])
    if found[tool] < 2:
        return None
    ours = {key: NAMES[key] for key in keys if NAMES.get(key) in set(known)}
    rest = [key for key in keys if key not in ours]
    return (
        f"a configuration of {tool}, which jlora does not read; its keys have other names "
        f"here: {', '.join(f'{key} is {name}' for key, name in ours.items())}"
        + (f"; without a counterpart: {', '.join(rest)}" if rest else "")
        + "; values may have another meaning, see --help"
    )
