"""Names on the Hugging Face hub, and whether the hub knows them."""

from __future__ import annotations

import re
from typing import Literal

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT_S = 5.0


def files_on_hub(name: str, kind: Literal["model", "dataset"]) -> list[str]:
    """The names of the files of a model or a data set.

    It asks once: the libraries that download would try for half a minute to reach a hub that does not answer.

    Raises:
        ConnectionError: the hub is switched off by HF_HUB_OFFLINE, does not answer, or gives nothing of that name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        found = ask(name, timeout=TIMEOUT_S)
    except (HTTPError, OSError) as error:
        raise ConnectionError(str(error).strip().splitlines()[0]) from error
    return [file.rfilename for file in found.siblings or ()]
