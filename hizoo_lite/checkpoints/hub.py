"""From a folder's path or a Hugging Face Hub id to a local folder that has everything loading needs.

Only configuration, tokenizer and safetensors files are fetched; pickled weights (`.bin`, `.pt`) are
never downloaded or read. Honours HF_HUB_OFFLINE and the rest of huggingface_hub's settings.
"""

from __future__ import annotations

import threading
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from hizoo_lite.errors import UserError

#: Vocabularies besides *.json; never code.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken"]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: How long the Hub may take to say that it is there.
REACH_SECONDS = 3.0


def resolve(source: str | Path, revision: str | None) -> Path:
    """The local folder of `source`: the folder itself, or the Hub's files in its cache.

    A path that exists is never looked up on the Hub. Raises `UserError`, saying which, if `source`
    is neither, if it needs a network that is not there, and if access is refused.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = check_source(source)
    small = _download(text, revision, SMALL_FILES)
    weights = "*.safetensors" if (small / INDEX_FILE).exists() else SINGLE_FILE
    return _download(text, revision, [*SMALL_FILES, weights])


def reach() -> str:
    """Whether the Hub answers, in words that begin with "on", "off" or "no answer".

    A HEAD request of the library's own client, so with its settings and the system's proxies.
    """
    answer: list[str] = []
    asking = threading.Thread(target=lambda: answer.append(_ask()), daemon=True)  # names may take long
    asking.start()
    asking.join(REACH_SECONDS)
    return answer[0] if answer else f"no answer of {constants.ENDPOINT} within {REACH_SECONDS:g} s"


def _ask() -> str:
    try:
        status = get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS).status_code
    except OfflineModeIsEnabled:
        return "off (HF_HUB_OFFLINE)"
    except Exception as error:  # of the client, which is another library by the version
        return f"no answer of {constants.ENDPOINT} ({type(error).__name__}: {error})"
    return f"on ({constants.ENDPOINT} answers{'' if status < 400 else f' with status {status}'})"


def check_source(source: str | Path) -> str:
    """The source, which is no folder, as a Hub id. Raises `UserError` if it can only be meant as a folder."""
    text = str(source)
    if Path(source).expanduser().exists():
        raise UserError(f"model: {source} is a file; the folder with config.json is wanted")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise UserError(f"model: the folder {source} does not exist")
    return text


def resolve_small(source: str | Path, revision: str | None) -> Path:
    """A folder with the config.json of a Hub id, and the index of its weights if there is one."""
    return _download(str(source), revision, ["config.json", INDEX_FILE])


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    at = f"{repo} (revision {revision})" if revision else repo
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*", "consolidated*"]
        )
    except GatedRepoError as error:
        raise UserError(
            f"model: access to {at} on the Hub must be granted; log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model: the Hub has no revision {revision!r} of {repo}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model: {at} is neither a local folder nor a repository on the Hub") from error
    except HFValidationError as error:
        raise UserError(f"model: {repo!r} is neither a local folder nor a valid Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model: {at} is not a local folder, not in the Hub's cache, and the Hub cannot be reached "
            f"(offline?): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return Path(folder)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as the model ORG/NAME, which is made if it is not there; its address.

    Raises `UserError` if the Hub refuses the name or access, or cannot be reached.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=name))
    except HFValidationError as error:
        raise UserError(f"push: {name!r} is no name of a repository: {error}") from error
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"push: {name} cannot be written on the Hub ({said}); log in with `hf auth login`, or check the "
            "network"
        ) from error
