"""Adapters on disk, in peft's format, both ways: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, "my_adapter")            # then, in peft: PeftModel.from_pretrained(base, "my_adapter")
    load_adapter(base, "my_adapter")             # and what peft saved, here

Tensors are named base_model.model.<path>.lora_A.weight (r, in) and .lora_B.weight (out, r), for embeddings
.lora_embedding_A and _B; convolutions have (r, in, h, w) and (out, r, 1, 1). The scale is in no tensor: it is
r, lora_alpha and use_rslora in the configuration. Nothing is unpickled. Source: files that peft 0.21 wrote.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor, nn

from .config import LoRAConfig
from .initialization import INITIALIZERS, Init
from .layers import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear
from .model import Plan, apply_plan, build_layers, layer_kind, lora_layers, plan_lora, uncompiled

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BESIDE, OLD = ".saving-", "old_config.json"  # where a save writes, and keeps what it takes away
COPY = re.compile(r"\.(modules_to_save|original_module)\.")  # peft with bias="all" writes such biases a second time
FIELDS = [field.name for field in dataclasses.fields(LoRAConfig)]
TO_PEFT = {"kaiming": True, "random": False, "zero_a": True, "zero": True}  # the rest has the same name there
# What else peft writes: of no effect on the weights, or allowed at these values only, being a variant otherwise.
INERT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
INERT |= {"task_type", "loftq_config", "megatron_config", "megatron_core", "runtime_config"}
INERT |= {"corda_config", "eva_config", "lora_ga_config", "qalora_group_size"}
HEADS = {"classifier", "score"}  # peft puts both in every classifier's modules_to_save; a model has one
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the model's adapter to `directory`, made if need be: factors, trained biases, modules trained in full.

    Both files are written beside and renamed into place, and an old configuration that differs is taken away first:
    a kill at any moment leaves the old adapter, the new one, or no configuration (load_adapter then says how to mend
    it), and what it left behind goes with the next save. Saves to one directory take turns. Merged, compiled or not
    makes no difference. Errors: ValueError for a model without adapter, a start that a reader cannot replay
    ("lora_ga", add_lora's `init_fn` with another base, "pissa" but in linear layers), or numbers that are not finite;
    OSError as the system gives it. Nothing changed.
    """
    plan = _plan(model)
    if plan.config.init_name == "lora_ga":
        raise ValueError(
            "the start (init_lora_weights = 'lora_ga', or add_lora's `init_fn`) changed the base by what no file "
            "holds; save the whole model (its state_dict) instead"
        )
    for path in plan.layers if plan.config.init_name == "pissa" else ():
        if not isinstance(layer := model.get_submodule(path), LoRALinear):
            raise ValueError(
                f"{path}: peft replays init_lora_weights = 'pissa' on linear layers alone, this is a "
                f"{type(layer).__name__}; save the whole model (its state_dict) instead"
            )
    tensors = _tensors(model, plan)
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device and holds no numbers; there is nothing to save")
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} has NaN or infinite entries; an adapter that diverged is not worth saving")
    settings = _to_peft(model, plan.config)
    content = {
        TENSORS: format_tensors(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(settings, indent=2, sort_keys=True, default=_number) + "\n").encode(),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _saving(directory) as beside:
        for name, data in content.items():
            with open(beside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if (directory / CONFIG).read_bytes() != content[CONFIG]:
                os.replace(directory / CONFIG, beside / OLD)
        for name in content:
            os.replace(beside / name, directory / name)


def load_adapter(model: nn.Module, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Adapt a plain model as the files in `directory` say, in place, and return it.

    With trainable = False everything is frozen, for inference. The files are read and checked against the model
    before anything in it changes. A start that peft replays on the base ("pissa") is replayed. Factors keep the file's
    dtype, biases and modules trained in full the model's.

    Errors, the model unchanged: FileNotFoundError for a missing file (a pickled adapter_model.bin is not read);
    ValueError, with the name, for a truncated or foreign file, a configuration that enables what is not
    implemented, targets that the model lacks, missing, unknown or misshapen tensors, numbers that are not finite, and
    files that were saved anew while they were read.
    """
    directory, whole = Path(directory), model
    model = uncompiled(model)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    if read_config(directory) != config:
        raise ValueError(f"{directory} was saved anew while it was read; load it again")
    if config.modules_to_save is not None and isinstance(model, nn.Module):
        paths = [path for path, _ in model.named_modules()]
        lacking = {name for name in HEADS if not any(path.endswith(name) for path in paths)}
        config = dataclasses.replace(
            config, modules_to_save=[name for name in config.modules_to_save if name not in lacking]
        )
    plan = plan_lora(model, config)
    if config.init_name == "lora_ga":
        raise ValueError(f"{directory / CONFIG}: init_lora_weights = 'lora_ga' needs a base that no file holds")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"this {type(model).__name__} is on the meta device and holds no numbers; load its own first")
    expected = _expected(model, plan)
    for key, (shape, dtype) in expected.items():
        if key not in tensors:
            raise ValueError(f"{directory / TENSORS} lacks {key}; it is an adapter for another base, or cut short")
        found = tensors[key]
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{directory / TENSORS}: {key} has shape {tuple(found.shape)}, this model needs {shape}; "
                "it is an adapter for another base"
            )
        if found.dtype not in (FLOATS if dtype.is_floating_point else (dtype,)):
            raise ValueError(f"{directory / TENSORS}: {key} holds {found.dtype}, this model needs {dtype}")
        if not torch.isfinite(found).all():
            raise ValueError(f"{directory / TENSORS}: {key} has NaN or infinite entries")
    unknown = sorted(
        key for key in set(tensors) - set(expected) if not COPY.search(key) and not _is_base(model, key, tensors[key])
    )
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{directory / TENSORS} has {unknown[0]}{more}, for which this model has no use")

    def init_fn(path: str, W: Tensor, own: LoRAConfig) -> Init:
        kind = layer_kind(model.get_submodule(path))
        A, B = (tensors[name].to(W.device).flatten(1).contiguous() for name in _names(path, kind))
        replayed = own.init_name == "pissa" and issubclass(kind, LoRALinear)  # as peft does
        return Init(A, B, INITIALIZERS["pissa"](W, own.r, own.scale).W0 if replayed else W)

    built = build_layers(model, plan, init_fn)
    apply_plan(model, plan, built)
    with torch.no_grad():
        state = model.state_dict(keep_vars=True)
        for key, name in _others(model, plan).items():
            state[name].copy_(tensors[key])
    return whole if trainable else whole.requires_grad_(False)


def read_config(directory: str | os.PathLike) -> LoRAConfig:
    """The LoRAConfig in an adapter's directory. Errors as load_adapter's."""
    path = Path(directory) / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        mend = "name a directory that save_adapter or peft wrote"
        if beside := _unfinished(path.parent):
            mend = f"a save still runs, or was cut short: then move the adapter_* files of {beside} to {path.parent}"
        raise FileNotFoundError(f"{path} does not exist; {mend}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it was cut short, or is no adapter's configuration") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path} has peft_type {kind!r}; only 'LORA' is read here")
    for key, value in settings.items():
        if key not in FIELDS and key not in INERT and not (value is None or value is False or value in ([], {})):
            raise ValueError(f"{path} enables {key} = {value!r}, which is not implemented; load this adapter in peft")
    known = {key: settings[key] for key in FIELDS if key in settings}
    for key in ("rank_pattern", "alpha_pattern"):
        known[key] = known.get(key) or {}
    try:
        return LoRAConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """A folder beside the files, to write them in. It goes at the end, unless it has what the directory now lacks.

    With the lock, any other such folder is a killed save's, and goes too; without (Windows, NFS), those stay.
    """
    lock = _lock(directory)
    try:
        beside = Path(tempfile.mkdtemp(prefix=f"{BESIDE}{time.time_ns()}-", dir=directory))
        try:
            yield beside
        finally:
            if os.path.lexists(beside / OLD) and os.path.exists(beside / TENSORS):  # the old tensors are in place
                os.replace(beside / OLD, directory / CONFIG)
            if _unfinished(directory) != beside:
                shutil.rmtree(beside, ignore_errors=True)
        for left in directory.glob(f"{BESIDE}*") if lock is not None else ():
            shutil.rmtree(left, ignore_errors=True)
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open too
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """The directory, open, with a lock that ends with this process; None where directories take none."""
    if fcntl is None:
        return None
    file = None
    try:
        file = os.open(directory, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file
    except OSError:
        if file is not None:
            os.close(file)
        return None


def _unfinished(directory: Path) -> Path | None:
    """The folder of a save that took the configuration away and did not bring the new one, if there is one."""
    if os.path.exists(directory / CONFIG):
        return None
    cut = [
        beside
        for beside in directory.glob(BESIDE + "*")
        if os.path.exists(beside / CONFIG) and (os.path.lexists(beside / OLD) or not os.path.exists(beside / TENSORS))
    ]
    return max(cut, default=None)  # their names begin with the time


def _plan(model: nn.Module) -> Plan:
    lora_layers(model)
    plan = getattr(model, "lora_plan", None)
    if plan is None:
        raise ValueError(f"{type(model).__name__} was adapted by hand; add_lora or load_adapter remember what to save")
    return plan


def _to_peft(model: nn.Module, config: LoRAConfig) -> dict:
    """The configuration as peft reads it; "all-linear" is written out, as peft does.

    Of a model of transformers its class and its name or path are written too, with which peft's AutoPeftModel… finds
    the base: the path is the one that the base was loaded from, and so of use on the same machine alone.
    """
    settings = {name: getattr(config, name) for name in FIELDS}
    settings["init_lora_weights"] = TO_PEFT.get(config.init_name, config.init_name)
    if settings["target_modules"] == "all-linear":
        paths = sorted(map(_plain, lora_layers(model)))
        others = {_plain(path) for path, _ in model.named_modules()} - set(paths)
        clash = any(other.endswith("." + path) for other in others for path in paths)  # "0" would mean "1.0" too
        settings["target_modules"] = "|".join(map(re.escape, paths)) if clash else paths
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(settings[name], (set, tuple)):
            settings[name] = sorted(settings[name])
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    kind, mapping = type(uncompiled(model)), None
    if kind.__module__.startswith("transformers."):
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    settings |= {"auto_mapping": mapping, "base_model_name_or_path": name}
    return settings | {"peft_type": "LORA", "inference_mode": True, "task_type": None}


def _number(value) -> int | float:
    """What json does not know: NumPy's and torch's numbers, fractions."""
    return value.item() if hasattr(value, "item") else float(value)


def _plain(path: str) -> str:
    """The path as it is without torch.compile around a part of the model."""
    return path.replace("_orig_mod.", "")


def _names(path: str, kind: type[LoRALayer]) -> tuple[str, str]:
    path = _plain(path)
    if kind is LoRAEmbedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _file_shapes(base_weight: Tensor, kind: type[LoRALayer], r: int) -> tuple[tuple, tuple]:
    d, k = kind.weight_to_matrix(base_weight).shape
    if kind is LoRAConv2d:
        return (r, *base_weight.shape[1:]), (d, r, 1, 1)
    return (r, k), (d, r)


def _tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The adapter as the file has it: peft's keys → tensors in its shapes."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        shapes = _file_shapes(layer.weight, type(layer), len(layer.lora_A))
        for key, factor, shape in zip(_names(path, type(layer)), (layer.lora_A, layer.lora_B), shapes):
            tensors[key] = factor.reshape(shape)
    state = model.state_dict(keep_vars=True)
    return tensors | {key: state[name] for key, name in _others(model, plan).items()}


def _others(model: nn.Module, plan: Plan) -> dict[str, str]:
    """peft's keys → this model's names of what is trained beside the factors: biases, modules in full (buffers too)."""
    keys, adapted = {}, set(map(_plain, plan.layers))
    for name in model.state_dict(keep_vars=True):
        path, _, last = _plain(name).rpartition(".")
        if any(path == saved or path.startswith(saved + ".") for saved in map(_plain, plan.saved)):
            keys[PREFIX + _plain(name)] = name
        elif last == "bias" and path in adapted and plan.config.bias != "none":
            keys[f"{PREFIX}{path}.base_layer.bias"] = name
        elif last == "bias" and plan.config.bias == "all":
            keys[PREFIX + _plain(name)] = name
    return keys


def _expected(model: nn.Module, plan: Plan) -> dict[str, tuple[tuple, torch.dtype]]:
    """The file's keys with their shapes and kinds of number, for a plain model that is to be adapted by this plan."""
    kinds = {}
    for path, own in plan.layers.items():
        base = model.get_submodule(path)
        kind = layer_kind(base)
        shapes = _file_shapes(base.weight, kind, own.r)
        kinds |= {key: (shape, torch.float32) for key, shape in zip(_names(path, kind), shapes)}
    state = model.state_dict(keep_vars=True)
    return kinds | {key: (tuple(state[name].shape), state[name].dtype) for key, name in _others(model, plan).items()}


def _is_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether this is a copy of a weight that the model has: peft writes adapted embeddings' so."""
    own = model.state_dict().get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    return own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own))


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        pickled = (directory / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle, which can run code: convert it in peft" if pickled else "save it first"
        raise FileNotFoundError(f"{path} does not exist; {hint}") from None
    try:
        return parse_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from None
