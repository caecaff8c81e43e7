"""What a run leaves in `adapter/`: its adapter in PEFT's form."""

from jlora.formats.peft.adapter_writer import save_adapter
from jlora.lora.adapter_tree import Params
from jlora.train.run import Run


def export_adapter(base_name: str | None, run: Run, trained: Params, step: int) -> None:
    """Writes the adapter of a step as a PEFT folder.

    Args:
        base_name: what PEFT can load as the base, None if that is not known.
        run: whose adapter it is.
        trained: its trainable leaves.
        step: of the run.
    """
    name, out = run.lora.base_model_name_or_path or base_name, run.folder / "adapter"
    save_adapter(trained, run.lora, out, name, overwrite=True)
    unnamed = (
        "; it names no base, as no folder or hub id that PEFT could load is known: set "
        "base_model_name_or_path in its adapter_config.json"
    )
    print(f"adapter of step {step} written to {out}{'' if name else unnamed}")
