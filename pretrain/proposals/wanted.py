"""Whether a recipe and the proposals that it is given fit together: refused before any work, in whoever's program."""

from pathlib import Path
from typing import Any

from detco.views.base import ProposalRecipe, ViewRecipe
from pretrain.images import ImageList
from pretrain.proposals.store import ProposalStore


def check_proposals_wanted(path: str, recipe: ViewRecipe[Any, Any], *, method: str, root: str) -> None:
    """Refuse proposals that are missing or of no use.

    Args:
        path: Value of DATA.PROPOSALS; "" for none.
        recipe: Of the views.
        method: Value of METHOD.NAME, for the message.
        root: Where the images lie, for the message; "" if that is not known.

    Raises:
        ValueError: If so.
    """
    if isinstance(recipe, ProposalRecipe) and not path:
        raise ValueError(
            f"METHOD.NAME {method} draws its views around objects, so it needs DATA.PROPOSALS: make them with "
            f"`python tools/generate_proposals.py {root or 'IMAGES'} -o proposals` and add DATA.PROPOSALS proposals"
        )
    if path and not isinstance(recipe, ProposalRecipe):
        raise ValueError(
            f"the views of METHOD.NAME {method} have no use for DATA.PROPOSALS {path}; leave it out, or choose another "
            f"method"
        )


def open_proposals_of(path: str, images: ImageList, *, root: str) -> ProposalStore | None:
    """Open the store at `path`, None if that is ""; refuse one that was made of other images.

    Args:
        path: Value of DATA.PROPOSALS.
        images: That the store must have been made of.
        root: Where they lie, as the user wrote it.

    Raises:
        FileNotFoundError: If there is no finished store.
        ValueError: If it is damaged, or of other images.
    """
    if not path:
        return None
    proposals = ProposalStore.open(Path(path))
    if proposals.images_digest != images.digest:
        raise ValueError(
            f"DATA.PROPOSALS {path} was made of {len(proposals):,} images, but {root} lists {len(images):,} and not "
            f"the same names: name the folder (or listing) they were made of, or make new ones with "
            f"`python tools/generate_proposals.py {root} -o NEW_FOLDER`"
        )
    return proposals
