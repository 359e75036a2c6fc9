"""Can one ensemble's weights take the place of another's in a running engine?"""

from __future__ import annotations

from drafts.errors import ManifestError
from drafts.manifest import Ensemble, Member, ResidualDraft


def check_same_shape(old: Ensemble, new: Ensemble) -> None:
    """Raise `ManifestError` if they differ in more than the drafts' weights."""
    if old.target_path != new.target_path:
        raise ManifestError(
            f"a swap changes drafts only: the target is {old.target_path}, "
            f"the new ensemble's is {new.target_path}"
        )
    for attribute in ("name", "kind", "layer", "draw"):
        have, want = (
            [getattr(member.draft, attribute, None) for member in ensemble.members]
            for ensemble in (new, old)
        )
        if have != want:
            raise ManifestError(
                f"a swap cannot change the drafts' {attribute}: {want} serve, {have} were given"
            )
    for before, after in zip(old.members, new.members, strict=True):
        if _shape(before) != _shape(after):
            raise ManifestError(
                f"a swap changes weights only, and the config.json of draft "
                f"'{after.draft.name}' differs from the one that serves"
            )
    if list(old.students().values()) != list(new.students().values()):
        raise ManifestError("a swap cannot change which residual drafts share a checkpoint")


def _shape(member: Member) -> object:
    if isinstance(member.draft, ResidualDraft):
        return member.config
    # What a checkpoint was called and who saved it is no part of its shape.
    names = {"_name_or_path", "transformers_version", "dtype"}
    return {key: value for key, value in member.config.to_dict().items() if key not in names}
