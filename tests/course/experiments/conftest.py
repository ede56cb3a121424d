"""What the tests of the experiments share: every arm's model."""

import copy
import json
from dataclasses import replace

import pytest

from lora_ref.course.experiments import training_run
from lora_ref.course.experiments.arms import ARMS
from lora_ref.course.experiments.training_run import build_model

from .arm_models import SHIPPED, TOKENIZER, title


@pytest.fixture(scope="session")
def built():
    """title → the shipped model as the arm's runs begin (from the shipped weights), one build for each adapter."""
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "language_model", lambda: (copy.deepcopy(SHIPPED), TOKENIZER))
        for arm in ARMS:
            key = json.dumps([arm.adapter, arm.trainable_pattern])
            if key not in models:
                models[key] = build_model(replace(arm, initial_weights="prose_llama"), 0)[0]
    return {title(arm): models[json.dumps([arm.adapter, arm.trainable_pattern])] for arm in ARMS}
