"""From a folder to the Hub, as one commit."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_disparse.config import UserError, one_line
from hf_disparse.export.card import write_card
from hf_disparse.export.compact import save_compact
from hf_disparse.export.folder import copy_companions, is_multitask
from hf_disparse.export.packed import save_packed
from hf_disparse.export.task import save_tasks
from hf_disparse.model.loading import INDEX_NAME, WEIGHTS_NAME, model_folder, weight_files

_REASONS = {
    401: "the token is not valid; pass another `token` or run `hf auth login`",
    403: "the token has no permission to write there",
    404: "the repository does not exist or the token has no access to it",
    412: "someone else pushed to it in the meantime; push again to build on their commit",
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
    """Exports a model, writes its card and uploads both as one commit; creates the repository if there is none.

    Args:
        model: the folder or Hub id of a model.
        form: `packed`, `compact`, or `plain` (as it is).
        dtype: of the floating point weights; default: unchanged.
        with_tasks: also upload every task as a plain model, in `tasks/<name>`.
        private, token: as in huggingface_hub.
        license: for the card.
        api: used instead of a new `HfApi(token)`.

    Returns:
        The URL of the commit.

    Raises:
        UserError: the Hub refused the upload, with the reason. The next call does not resend files that arrived whole.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id: {one_line(error)}") from None
    source, api = model_folder(model), api or HfApi(token=token)
    if with_tasks and not is_multitask(source):
        raise UserError("with_tasks: only applies to a MultitaskModel; this model has one task already")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        if form == "packed":
            save_packed(source, folder, dtype)
        elif form == "compact":
            save_compact(source, folder, dtype)
        elif form == "plain":
            _link_plain(source, folder)
        else:
            raise UserError(f"form: expected packed, compact or plain, got {form!r}")
        if is_multitask(folder):
            write_card(folder, repo_id, license)
        if with_tasks:
            save_tasks(source, Path(temporary, "tasks"), dtype=dtype, name=repo_id)
            Path(temporary, "tasks", "tasks").rename(folder / "tasks")
        return _upload(api, folder, repo_id, private)


def _link_plain(source: Path, folder: Path) -> None:
    """Makes `folder` with links to the weights in `source` and copies of its companions."""
    folder.mkdir()
    files = weight_files(source)
    for path in files if files[0].name == WEIGHTS_NAME else (*files, source / INDEX_NAME):
        (folder / path.name).symlink_to(path.resolve())
    copy_companions(source, folder)


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool | None) -> str:
    """Uploads the folder as one commit on top of the present one; returns its URL."""
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id).sha
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Push by hf_disparse", parent_commit=head
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = _REASONS.get(status, one_line(error))
        raise UserError(f"{repo_id}: the Hub refused the upload: {reason} (status {status})") from error
    except Exception as error:  # connections raise many types of errors, before and during an upload
        raise UserError(
            f"{repo_id}: the upload was interrupted: {type(error).__name__}: {one_line(error)}\n"
            "Nothing was committed. Push again to resume; files that were sent are not sent again."
        ) from error
    return commit.commit_url
