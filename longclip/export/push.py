"""An export folder -> a repository on a model hub. Nothing else in longclip sends anything anywhere.

Only files that an export consists of are sent, whatever else lies in the folder.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..types import UserError
from .formats import FORMATS

_SENT = ("*.safetensors", "*.onnx", "*.onnx.data", "*.json", "merges.txt", "README.md")


def files_of(directory: Path) -> list[Path]:
    """What would be sent. Raises UserError where the folder is no export."""
    markers = {kind.marker for kind in FORMATS.values()}
    if not any((directory / marker).is_file() for marker in markers):
        raise UserError(
            f"{directory} is no export (none of {', '.join(sorted(markers))} in it): "
            f"longclip export RUN --out {directory} makes one"
        )
    return sorted({path for pattern in _SENT for path in directory.glob(pattern) if path.is_file()})


def push(
    directory: str | Path,
    repository: str,
    public: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Send an export in one commit; the repository is made where it is not there yet. Returns its address.

    Args:
        repository: OWNER/NAME.
        public: may everybody read it; says nothing about one that exists.
        endpoint: the hub's address; None: Hugging Face's, or what HF_ENDPOINT says.
        token: None: the one of `hf auth login` or HF_TOKEN.

    Raises UserError where the folder is no export, the name is none, or the hub refuses.
    """
    directory = Path(directory).expanduser()
    files = files_of(directory)
    _check_name(repository)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(path.name, path) for path in files]
        api.create_commit(repository, operations, commit_message="Export by longclip")
    except (HTTPError, LocalTokenNotFoundError, OSError, RuntimeError) as error:
        raise UserError(
            f"{api.endpoint} did not take {repository}: {_short(error)}; `hf auth login` or HF_TOKEN "
            "with a token that may write there is needed"
        ) from error
    return str(url)


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository: {_short(error)}") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no name of a repository: expected OWNER/NAME")


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
