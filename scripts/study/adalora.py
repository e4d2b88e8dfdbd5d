"""The peer AdaLoRA (arXiv 2303.10512), by PEFT: its settings, and the call that its allocation needs in each update.

From the authors' scripts for GLUE: three components a layer for a final budget of one, else half as many again as in
the end; the budget falls from 0.12 of the training on and stands for the last 0.52 of it (CoLA: 800 and 3,500 of 6,700
updates), masks every 10 updates, orthogonality weighs 0.1, alpha is 32.
"""

from transformers import TrainerCallback


def with_adalora(model, b: int, targets: list[str] | str, updates: int):
    """The classifier with PEFT's adapter, which ends at b components a layer, on average over layers."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=targets,
        init_r=max(3, 3 * b // 2),
        target_r=b,
        lora_alpha=32,
        tinit=round(0.12 * updates),
        tfinal=round(0.52 * updates),
        deltaT=10,
        orth_reg_weight=0.1,
        total_step=updates,
    )
    return get_peft_model(model, config)


class Allocate(TrainerCallback):
    """Allocates the budget after each update, while its gradients are there."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def components(model) -> int:
    """How many components are not masked, over all layers: singular values that are not zero."""
    return sum(int((value != 0).sum()) for name, value in model.named_parameters() if ".lora_E." in name)
