"""Exported models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.errors import RunError, UserError


def check_name(name: str) -> None:
    """Raises UserError for what is not OWNER/NAME, or cannot be on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if "/" not in name:
        raise UserError(f"--push {name}: expected OWNER/NAME, such as my-name/{name or 'my-model'}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: not a name on the hub: {' '.join(str(error).split())}") from None


def push(model: Path, name: str) -> str:
    """Uploads a model, a directory or a file, to the repository `name`, made where there is none; returns its address.

    Raises RunError where it does not arrive; `model` is as it was.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        there, message = repository.repo_id, "Pruned by pgprune"
        if model.is_dir():
            api.upload_folder(repo_id=there, folder_path=model, commit_message=message)
        else:
            api.upload_file(repo_id=there, path_or_fileobj=model, path_in_repo=model.name, commit_message=message)
    except Exception as error:  # of the hub, of its HTTP library (another one in older versions), of the network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(
            f"--push {name}: did not arrive on the hub ({reason}); the model is in {model}, and "
            f"`hf upload {name} {model}` tries again"
        ) from None
    return str(repository)
