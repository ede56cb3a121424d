"""Where models come from: the package itself, local directories, the Hugging Face Hub by name; how the Hub is asked.

A local directory stands wherever a Hub name does. Without a network a name that is in the Hub's local cache works; any
other is refused at once, with what to do. (Data sets: see tables.)
"""

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from torch import nn

from ..text.language_model import language_model

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(name: str):
    """The tokeniser of the shipped model ("prose_llama"), a directory or a Hub name. Errors as load_model's."""
    from transformers import AutoTokenizer

    if name == "prose_llama":
        return language_model()[1]
    return _pretrained(AutoTokenizer, name)


def load_model(name: str, task: str = "data-to-text", labels: int | None = None, seed: int = 0) -> nn.Module:
    """The model in float32 and eval mode: a causal language model, or a classifier of so many labels.

    `seed` draws what the files do not hold, such as a new classifier's head. Errors: FileNotFoundError for a directory
    that is none or holds no model; ConnectionError for a Hub name that is neither cached nor to be reached, or whose
    download breaks off; OSError for a name that the Hub does not know.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if name == "prose_llama":
        return language_model()[0]
    more = {} if labels is None else {"num_labels": labels}
    kind = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _pretrained(kind, name, dtype=torch.float32, **more).eval()


def _pretrained(kind: type, name: str, **options):
    """kind.from_pretrained(name), with errors that say what to do."""
    local = is_local(name, "model")
    offline = local or not reachable()
    try:
        with asking(offline), quiet(bars=not offline and sys.stderr.isatty()):
            return kind.from_pretrained(name, local_files_only=offline, **options)
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not _broke_off(error):
            raise
        if local:
            raise FileNotFoundError(
                f"{name} holds no model of this kind ({first_line(error)}); name a directory that save_pretrained wrote"
            ) from None
        raise refusal(name, "model", error, offline) from None


def is_local(name: str, what: str) -> bool:
    """Whether the name is a path that exists. Errors: FileNotFoundError for one that can be no Hub name either."""
    if Path(name).exists():
        return True
    if not NAME.fullmatch(name):
        raise FileNotFoundError(f"{name} does not exist, and is no name of a {what} on the Hub (OWNER/NAME)")
    return False


def reachable(seconds: float = 5.0) -> bool:
    """Whether the Hub can be asked: not set offline, and its host, or the proxy on the way to it, answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url, proxies = urlparse(constants.ENDPOINT), getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.netloc):
        url = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 1080)
        socket.create_connection((url.hostname, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def unreachable(name: str, what: str) -> str:
    """What was asked for, how to have it, what runs instead."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    command = f"hf download {name}"
    if what == "data set":  # of what `hf download` brings, `datasets` finds nothing again without a network
        command = f"python -c \"from lora_ref.course.finetune.tables import load_tables; load_tables('{name}')\""
    return (
        f"the {what} {name} is not in the local cache, and {why}. Where there is a network, `{command}` puts it into "
        f"HF_HOME (here {constants.HF_HOME}): set HF_HOME to a copy of that directory, or name a local directory "
        f"instead of {name}. Without any of this, --profile cpu-mini (a CPU) and --profile gpu-offline (a GPU) need "
        "no network"
    )


def refusal(name: str, what: str, error: Exception, offline: bool) -> OSError:
    """What to raise for an error of the libraries, which come in many kinds and hide one another."""
    if offline or isinstance(error, ConnectionError) or not reachable():
        return ConnectionError(unreachable(name, what))
    if cause := _broke_off(error):
        return ConnectionError(f"the download of the {what} {name} failed: {first_line(cause)}; try it again")
    said, hint = " ".join(str(error).strip().split("\n")[:2]) or type(error).__name__, ""
    if "scripts are no longer supported" in said:
        hint = f"; its copy as parquet may do: {name.partition('@')[0]}@refs/convert/parquet"
    return OSError(f"{name} cannot be loaded from the Hub: {said[:300]}{hint}")


def _broke_off(error: BaseException | None) -> BaseException | None:
    """The error of the network behind another error: httpx's (or httpx2's, by the Hub library's version) or Xet's."""
    while error is not None:
        if {kind.__name__ for kind in type(error).__mro__} & {"TransportError", "XetDownloadError"}:
            break
        error = error.__cause__ or error.__context__
    return error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


@contextmanager
def asking(offline: bool) -> Iterator[None]:
    """Offline, without asking the Hub again and again for files that it may not even have."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Without transformers' reports of what was loaded, and its bars: at a terminal those of a download may stay."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if not bars:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
