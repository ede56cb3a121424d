"""The profiles of the fine-tuning command: a table of settings, each of which can be overridden.

    profile("cpu-mini", steps=50)        # a Profile; on the command line: --profile cpu-mini --steps 50

See lora_ref.course.finetune.config for the settings.
"""

from .config import AdapterSettings, BaseModelSettings, DataSettings, OptimisationSettings, Profile, SystemSettings
from .settings import did_you_mean, override

_GPU = SystemSettings(device="cuda", precision="bf16")
_HUB = Profile(
    base=BaseModelSettings(model="Qwen/Qwen2.5-0.5B"),
    data=DataSettings(
        dataset="tuetschek/e2e_nlg@refs/convert/parquet",
        max_train_samples=42_000,
        max_validation_samples=200,
        max_test_samples=630,
        max_length=192,
    ),
    optimisation=OptimisationSettings(
        steps=2000,
        batch_size=32,
        seeds=(0, 1, 2),
        full_lrs=(5e-6, 1e-5, 2e-5),
        lora_lrs=(1e-4, 2e-4, 4e-4),
    ),
    system=SystemSettings(device="cuda", precision="bf16", frozen_dtype="bf16"),
)
_MRPC = Profile(
    base=BaseModelSettings(model="FacebookAI/roberta-base"),
    data=DataSettings(
        task="classification",
        dataset="nyu-mll/glue:mrpc",
        max_train_samples=100_000,
        max_validation_samples=300,
        max_test_samples=1000,
        max_length=512,
    ),
    adapter=AdapterSettings(lora_alpha=8.0, target_modules=("query", "value")),
    optimisation=OptimisationSettings(
        seeds=(0, 1, 2),
        full_lrs=(1e-5, 2e-5, 4e-5),
        lora_lrs=(2e-4, 4e-4, 8e-4),
        steps=6900,
        warmup_ratio=0.06,
        weight_decay=0.1,
    ),
    system=_GPU,
)
PROFILES = {
    # Each learning rate is better on the validation examples than its half and its double (this profile, seed 0).
    "cpu-mini": Profile(system=SystemSettings(device="cpu", threads=1)),
    "gpu-hub": _HUB,
    # Hu et al. 2021 (arXiv 2106.09685), table 2 and table 9: r = 8 on query and value, batch 16, 30 and 60 epochs.
    "gpu-hub-mrpc": _MRPC,
    "gpu-hub-sst2": override(_MRPC, dataset="nyu-mll/glue:sst2", lora_lrs=(2.5e-4, 5e-4, 1e-3), steps=20_000),
    "gpu-offline": Profile(
        base=BaseModelSettings(model="new"),
        optimisation=OptimisationSettings(
            arms=("full", "r=1", "r=8", "r=64"),
            seeds=(0, 1, 2),
            full_lrs=(1e-4, 2e-4, 4e-4),
            lora_lrs=(1e-3, 2e-3, 4e-3),
            parallel_adapters=9,
            steps=400,
            batch_size=32,
        ),
        system=_GPU,
    ),
}


def profile(name: str, **overrides: object) -> Profile:
    """The named profile with these settings instead of its own.

    Args:
        name: one of PROFILES: "cpu-mini", "gpu-hub", "gpu-hub-mrpc", "gpu-hub-sst2", "gpu-offline".
        overrides: settings by their flat names: a field's own, such as `steps`; for all of `base` but `model` with
            the prefix base_, such as `base_hidden_size`.

    Returns:
        The profile, checked; the table stays as it is.

    Raises:
        ValueError: an unknown profile or setting, with near matches; values out of range or that contradict each
            other, with the range, its unit and the choices.
        TypeError: values of another type.

    Example:
        >>> mini = profile("cpu-mini", steps=50, arms=["r=3"])
        >>> mini.optimisation.steps, mini.optimisation.arms, mini.system.device
        (50, ('r=3',), 'cpu')
        >>> profile("cpu-mini", step=50)
        Traceback (most recent call last):
        ...
        ValueError: a profile has no field 'step'; did you mean 'steps', ...
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown; {did_you_mean(str(name), PROFILES)}")
    return override(PROFILES[name], **overrides)
