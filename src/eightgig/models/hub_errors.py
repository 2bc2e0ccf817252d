"""What goes wrong between us and the hub, as errors with the command that mends them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from eightgig.errors import DoesNotFitError, ModelError


@contextmanager
def explained_hub_errors(name: str, *, revision: str | None = None) -> Iterator[None]:
    """Turn huggingface_hub's exceptions about the repository `name` into ours.

    Raises:
        ModelError: The repository, revision or file is gated or missing, or cannot be reached.
        DoesNotFitError: The disk is full.
    """
    from huggingface_hub import errors

    # huggingface_hub 1 stands on httpx and 2 on httpx2; both name it only as a base class.
    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(name) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{name} has no revision {revision!r} on the hub.",
            why="Neither a branch, nor a tag, nor a commit has this name.",
            fix=f"Remove `model.revision`, or take one of https://huggingface.co/{name}/commits.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _not_found(name) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise unreachable_hub_error(name) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"{name} lacks a file on the hub that every model has.",
            why=str(error).splitlines()[0][:200] if str(error) else "The hub says: not found.",
            fix="Choose a repository with config.json and safetensors files.",
        ) from error
    except (errors.HFValidationError, errors.SafetensorsParsingError) as error:
        raise ModelError(
            f"{name} cannot be read from the hub.",
            why=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            fix="Check the name, or choose another copy of the model.",
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an unknown status")
        raise ModelError(
            f"The hub refused to give {name}: HTTP {status}.",
            why="It is overloaded, or the access token is not accepted.",
            fix="Try again in a minute; `hf auth whoami` says whose token is used.",
        ) from error
    except (network_error, ConnectionError, TimeoutError) as error:
        raise unreachable_hub_error(name) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DoesNotFitError(
            f"The disk became full while {name} was downloaded.",
            why="What was downloaded so far is kept, and the download resumes there.",
            fix="Free some space, or move the hub's cache: set the environment variable HF_HOME.",
        ) from error


def unreachable_hub_error(name: str) -> ModelError:
    """The hub cannot be reached, and `name` is not in its cache."""
    return ModelError(
        f"{name} is not on this machine, and the hub cannot be reached.",
        why="There is no network, or HF_HUB_OFFLINE is set.",
        fix=f"Where there is a network, run `hf download {name}`, or give the folder of a copy.",
    )


def _gated(name: str) -> ModelError:
    return ModelError(
        f"{name} is gated: its owner wants you to accept a licence first.",
        why="The hub gives it only to accounts that have, and it knows you by your token.",
        fix=f"Accept it on https://huggingface.co/{name}, then run `hf auth login`.",
    )


def _not_found(name: str) -> ModelError:
    return ModelError(
        f"There is no folder {name}, and no such model on the hub that you may see.",
        why="The name is misspelt, or the repository is private and you are not logged in.",
        fix=f"Look it up on https://huggingface.co/models?search={name.rpartition('/')[2]}; "
        "for a private one run `hf auth login`.",
    )
