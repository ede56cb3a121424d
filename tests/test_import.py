"""What `import lora_ref` costs and brings; import directions and docstrings are test_house.py's."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
HEAVY = ("matplotlib", "transformers", "sklearn", "peft", "loralib", "accelerate", "sacrebleu", "lora_ref.course")


def in_fresh_python(code):
    """The last line that a new interpreter prints, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_takes_at_most_a_tenth_of_a_second_above_torch():
    code = "import time, torch; start = time.perf_counter(); import lora_ref; print(time.perf_counter() - start)"
    assert statistics.median(in_fresh_python(code) for _ in range(5)) <= 0.1


def test_import_brings_nothing_heavier_than_torch():
    brought = in_fresh_python("import json, sys, lora_ref; print(json.dumps(list(sys.modules)))")
    assert "lora_ref.svd" in brought
    assert [name for name in brought if name.startswith(HEAVY)] == []


def test_every_public_name_is_there_callable_and_described_in_a_fresh_interpreter():
    code = (
        "import json, lora_ref; print(json.dumps({n: [callable(getattr(lora_ref, n)), getattr(lora_ref, n).__doc__]"
        " for n in lora_ref.__all__}))"
    )
    described = in_fresh_python(code)
    assert {"truncated_svd", "randomized_svd", "energy", "RandomSubspace"} <= set(described)
    assert len(lora_ref.__all__) == len(set(lora_ref.__all__))
    for name, (is_callable, doc) in described.items():
        assert is_callable and doc and doc.strip(), name
        assert doc != type.__doc__, name


def test_every_name_of_all_is_there_and_every_public_import_is_in_all():
    """Submodules are attributes too, but not names that the package passes on."""
    names = {n for n, v in vars(lora_ref).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
    assert names == set(lora_ref.__all__) and lora_ref.__all__ == sorted(lora_ref.__all__)
