"""From a folder to the Hub. Layer 7."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_disparse.config import UserError, one_line, require
from hf_disparse.export.card import is_multitask, write_card
from hf_disparse.export.compact import save_compact
from hf_disparse.export.folder import copy_companions
from hf_disparse.export.packed import save_packed
from hf_disparse.export.task import save_tasks
from hf_disparse.model.loading import INDEX_NAME, WEIGHTS_NAME, model_folder, weight_files

_REASONS = {
    401: "it does not accept the token; pass --token, or log in by `hf auth login`",
    403: "this token may not write there",
    404: "there is no such repository, or this token may not see it",
    412: "somebody else pushed to it meanwhile; the same command pushes on top of that",
}


def push(
    model: str | Path,
    repo_id: str,
    form: str = "packed",
    *,
    dtype: torch.dtype | None = None,
    with_tasks: bool = False,
    private: bool | None = None,
    license: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Exports a model, writes its card and uploads both as one commit; the repository is made if need be.

    Args:
        model: the folder or Hub id of a model.
        form: `packed`, `compact`, or `plain` (as it is).
        with_tasks: put every task beside it as a plain model, in `tasks/<name>`.
        private, token: of the repository, as huggingface_hub has them; `license` is for the card.
        api: instead of one made of `token`.

    Returns:
        The address of the commit.

    Raises:
        UserError: what the Hub refused, and why. Files that were sent whole are not sent again by the next call.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"REPO: expected USER/NAME, got {one_line(error)}") from None
    source, api = model_folder(model), api or HfApi(token=token)
    require(not with_tasks or is_multitask(source), "--with-tasks", "nothing with a model of one task", True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        if form == "packed":
            save_packed(source, folder, dtype)
        elif form == "compact":
            save_compact(source, folder, dtype)
        elif form == "plain":
            folder.mkdir()
            files = weight_files(source)
            for path in files if files[0].name == WEIGHTS_NAME else (*files, source / INDEX_NAME):
                (folder / path.name).symlink_to(path.resolve())
            copy_companions(source, folder)
        else:
            raise UserError(f"--format: expected packed, compact or plain, got {form!r}")
        if is_multitask(folder):
            write_card(folder, repo_id, license)
        if with_tasks:
            save_tasks(source, Path(temporary, "tasks"), dtype=dtype, name=repo_id)
            Path(temporary, "tasks", "tasks").rename(folder / "tasks")
        return _upload(api, folder, repo_id, private)


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool | None) -> str:
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id).sha
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Push by hf_disparse", parent_commit=head
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = _REASONS.get(status, one_line(error))
        raise UserError(f"{repo_id}: expected the Hub to take the model, but {reason} (status {status})") from error
    except Exception as error:  # connections fail in a dozen kinds, before and within an upload
        raise UserError(
            f"{repo_id}: the upload was cut off: {type(error).__name__}: {one_line(error)}\n"
            "Nothing was committed; the same command goes on, without the files that were sent."
        ) from error
    return commit.commit_url
