"""The Hugging Face Hub: whether it answers, and the upload of a finished folder."""

import contextlib
import re
import sys
from typing import Any, Iterator

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import get_session, validate_repo_id

from kd import BadInput, one_line


@contextlib.contextmanager
def cache_if_unreachable(seconds: float = 8.0) -> Iterator[None]:
    """Where the Hub does not answer within `seconds`, read only what the client has in its cache, in here.

    The client itself retries an unreachable Hub for most of a minute. It and `datasets` look at these variables
    whenever they connect.
    """
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before):
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception:       # of the HTTP library that this client uses
            for module in modules:
                module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before):
            module.HF_HUB_OFFLINE = value


def check(repo: str) -> None:
    """Raise BadInput where `--push-to-hub` names no repository; called before training starts. "" is no upload."""
    if not repo:
        return
    if re.search(r"hf_\w{20}", repo):   # the message does not repeat the token, and config.json must not hold it
        raise BadInput("--push-to-hub: that is an access token; give the repository, such as someone/student, and the "
                       "token to `hf auth login` or in HF_TOKEN")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise BadInput(f"--push-to-hub {repo}: names no repository; give one such as someone/student") from error


def push_folder(folder: str, repo: str, message: str) -> str:
    """Upload a saved folder to the Hub's `repo`, which is created if absent; returns one line about it.

    A failed upload must not harm the run whose result it carries. So nothing is raised: every failure becomes that
    line.
    """
    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(repo, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message)
    except Exception as error:  # the client, its HTTP library and its storage library raise exceptions of their own
        reason = (one_line(error) if huggingface_hub.get_token() else
                  "no login; run `hf auth login` or set HF_TOKEN, then push again")
        return f"not pushed: {reason}; {folder} is complete"
    return f"pushed {folder} to {api.endpoint}/{repo_id}"
