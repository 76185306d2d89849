"""Which subject a prompt names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import EvaluationError


def named_subjects(
    prompts: Sequence[str], classes: Sequence[str], subject_of: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return prompt to the class of the subject it names; prompts that name none are left out.

    Args:
        prompts: The prompts.
        classes: Names of the subject's classes; an underscore stands for a space.
        subject_of: Prompt to class, returned as it is. By default it is the longest class name that occurs in the
            prompt as a word.

    Raises:
        EvaluationError: `subject_of` names an unknown class.
    """
    if subject_of is not None:
        for prompt, name in subject_of.items():
            if name not in classes:
                raise EvaluationError(
                    f"Expected one of {', '.join(classes)} as the subject of {prompt!r}, got {name!r}. Correct it."
                )
        return dict(subject_of)
    found = {prompt: _class_in(prompt, classes) for prompt in prompts}
    return {prompt: name for prompt, name in found.items() if name is not None}


def _class_in(prompt: str, classes: Sequence[str]) -> str | None:
    for name in sorted(classes, key=len, reverse=True):
        words = re.escape(name.replace("_", " "))
        if re.search(rf"(?<!\w){words}(?!\w)", prompt, flags=re.IGNORECASE):
            return name
    return None
