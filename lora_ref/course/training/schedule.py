"""The learning-rate schedule: linear warm-up, then linear decay."""


def lr_factor(t: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate that step t = 0 … steps − 1 takes.

        f(t) = (t + 1) / warmup_steps                      t < warmup_steps
        f(t) = (steps − t) / (steps − warmup_steps)        from there on

    It rises to 1 in step warmup_steps − 1, is 1 once more in step warmup_steps, and would be 0 in step `steps`, the
    first that is not done.

    Args:
        t: the step, from 0.
        steps: how many there are.
        warmup_steps: how many of them the factor rises; fewer than `steps`.

    Returns:
        The factor, in (0, 1].

    Example:
        >>> [round(lr_factor(t, steps=6, warmup_steps=2), 2) for t in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if t < warmup_steps:
        return (t + 1) / warmup_steps
    return (steps - t) / (steps - warmup_steps)
