"""Uploads exported models to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.console.commands import command_line
from pgprune_cli.errors import RunError, UserError, in_short


def check_name(name: str) -> None:
    """Raise UserError unless `name` is OWNER/NAME and the hub accepts it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if "/" not in name:
        raise UserError(f"--push {name}: expected OWNER/NAME, such as my-name/{name or 'my-model'}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: not a valid name on the hub. {in_short(error)}") from None


def push(model: Path, name: str) -> str:
    """Upload a model, a directory or a file, to the repository `name`, and return its address.

    The repository is created if it does not exist. Raises RunError if the upload fails. `model` stays on disk.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        repository_id, message = repository.repo_id, "Pruned by pgprune"
        if model.is_dir():
            api.upload_folder(repo_id=repository_id, folder_path=model, commit_message=message)
        else:
            api.upload_file(
                repo_id=repository_id, path_or_fileobj=model, path_in_repo=model.name, commit_message=message
            )
    except Exception as error:  # raised by the hub, by its HTTP library (which differs by version) or by the network
        raise RunError(
            f"--push {name}: upload failed ({in_short(error) or type(error).__name__}). The model is in {model}. "
            f"Try again with: {command_line('hf', 'upload', name, model)}"
        ) from None
    return str(repository)
