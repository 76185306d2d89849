"""Words that separate hidden groups, as a CLIP model sees them: a hint for the eye, not a finding."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.preprocessing import normalize

from ..assets import COMMON_WORDS
from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..models.encoders import ClipEncoder
from ..seeds import derived_seed
from ..text import one_line
from .asked import known_rows
from .captions import words_in
from .evidence import cached_features
from .result import WORD_LIMIT, Audit, AuditWords, GroupWords, Word

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a photo with {} in it")
"""A word is the mean of these texts' unit embeddings (prompt ensembling; Radford et al., ICML 2021, 3.1.4)."""
IMAGES_PER_GROUP = 200  # most images of each group, under each prompt, that CLIP is shown
LEAST_IMAGES = 10  # smaller groups, and groups beside fewer other images, are not judged
LEVEL = 0.01
LEAST_EFFECT = 0.5  # standard deviations. With many images a difference that nobody could see would pass the test.
LEAST_OF_BEST = 0.5  # of the group's largest effect: one that shows the sea is nearer to all words near "sea" too
SYNONYMS = 0.7  # words are near-synonyms where their embeddings, less the mean of all words', have a larger cosine
MOST_WORDS = 6
MOST_CAPTION_WORDS = 300
LEAST_CAPTIONS = 3  # images whose captions must hold a word
_OF_PICTURES = "background foreground image images photo photograph photos picture pictures shot shown view your"
STOP_WORDS = sorted(ENGLISH_STOP_WORDS.union(_OF_PICTURES.split()))  # words that say nothing of what is shown
NO_WORD = "no word tells it apart"
TOO_FEW = f"too few images to tell (at least {LEAST_IMAGES} of the group and of others are needed)"

_Array = NDArray[Any]


def describe_groups(
    found: Audit,
    data: CaptionedImages,
    rows: _Array,
    encoder: ClipEncoder,
    config: AuditConfig,
    distinct: NDArray[np.bool_],
    *,
    cache_dir: Path,
    progress: bool = True,
) -> AuditWords:
    """The words that are nearer to the images of each group than to the others', by prompt and over all prompts.

    A score is the cosine of image and word, less the image's mean over all words. Words pass a one-sided Mann-Whitney
    U test at `LEVEL` (Bonferroni; Stouffer's method over prompts) with an effect (Cohen's d) of at least
    `LEAST_EFFECT` and near that of the best; near-synonyms and words of the prompt are left out. `rows` (N,) are
    indices into `data`; images that are not `distinct` (N,), copies of others, are not shown.
    """
    words = vocabulary(data.captions, config.words)
    texts = embedded(encoder, words)
    texts = texts - texts.mean(axis=0)
    samples = list(_samples(found, distinct, config.seed))
    shown = np.unique(np.concatenate([positions for *_, positions, _ in samples]))
    features = cached_features(cache_dir, encoder.features_digest(), data, rows[shown], encoder.extract, progress)
    images, judged = normalize(features.astype(float)), []
    for prompt, factor, positions, labels in samples:
        scores = images[np.searchsorted(shown, positions)] @ texts.T
        asked = {stem(word) for word in words_in(found.prompts[prompt].prompt)}  # what is asked for is not hidden
        said = np.array([{stem(part) for part in words_in(word) or [""]} <= asked for word in words], dtype=bool)
        tests = [_test(scores, labels == group, said) for group in range(found.num_groups[factor])]
        judged.append((prompt, factor, labels, tests))
    stems = np.array([stem(word) for word in words])
    alike = (normalize(texts) @ normalize(texts).T > SYNONYMS) | (stems[:, None] == stems)
    entries = []
    for factor, num_groups in enumerate(found.num_groups):
        of_factor = [one for one in judged if one[1] == factor]
        pooled = [of_factor] if len(of_factor) > 1 else []
        for together in [*([one] for one in of_factor), *pooled]:
            over = together[0][0] if len(together) == 1 else None
            for group in range(num_groups):
                if any((labels == group).any() for _, _, labels, _ in together):
                    own = np.array([tests[group] for *_, tests in together])
                    named = _named(own, num_groups, words, alike)
                    note = "" if named else NO_WORD if own[:, 0].any() else TOO_FEW
                    entries.append(GroupWords(over, factor, group, tuple(named), note))
    return AuditWords(encoder.name, found.fingerprint, len(words), len(shown), LEVEL, tuple(entries))


def embedded(encoder: ClipEncoder, words: Sequence[str]) -> _Array:
    """Unit embeddings of words, (V, D), each the mean over `TEMPLATES`."""
    texts = encoder.text_features([template.format(word) for word in words for template in TEMPLATES]).astype(float)
    return normalize(normalize(texts).reshape(len(words), len(TEMPLATES), -1).mean(axis=1))


def _test(scores: _Array, own: _Array, said: _Array) -> tuple[_Array, _Array, _Array]:
    """Precision (0 for a word that is not tried), Cohen's d and one-sided p-value of each word, (V,) each.

    Of `scores` (n, V) of one prompt's images, `own` (n,) are in the group; words `said` (V,) are in the prompt.
    """
    size, rest, words = own.sum(), (~own).sum(), scores.shape[1]
    precision, effect, p_value = np.zeros(words), np.zeros(words), np.ones(words)
    tried = np.flatnonzero((scores.std(axis=0) > 1e-9) & ~said)
    if min(size, rest) >= LEAST_IMAGES and len(tried):
        one, other = scores[own][:, tried], scores[~own][:, tried]
        within = ((size - 1) * one.var(axis=0, ddof=1) + (rest - 1) * other.var(axis=0, ddof=1)) / (size + rest - 2)
        precision[tried] = size * rest / (size + rest)
        effect[tried] = (one.mean(axis=0) - other.mean(axis=0)) / np.sqrt(np.maximum(within, 1e-18))
        p_value[tried] = mannwhitneyu(one, other, alternative="greater", method="asymptotic").pvalue
    return precision, effect, p_value


def _named(tests: _Array, num_groups: int, words: Sequence[str], alike: _Array) -> list[Word]:
    """The words of a group from its tests (prompts, 3, V), best first."""
    precision, effects, p_values = tests.transpose(1, 0, 2)
    total = np.maximum(precision.sum(axis=0), 1e-12)
    effect = (precision * effects).sum(axis=0) / total
    z = (np.sqrt(precision) * norm.isf(p_values.clip(1e-300, 1 - 1e-12))).sum(axis=0) / np.sqrt(total)
    corrected = np.minimum(norm.sf(z) * num_groups * np.count_nonzero(precision.any(axis=0)), 1.0)  # Bonferroni
    passes = (effect >= LEAST_EFFECT) & (corrected <= LEVEL)
    passes &= effect >= LEAST_OF_BEST * effect[passes].max(initial=0.0)
    named: list[int] = []
    for at in np.argsort(-effect, kind="stable").tolist():
        if passes[at] and not alike[at, named].any():
            named.append(at)
    return [Word(words[at], round(float(effect[at]), 3), round(float(corrected[at]), 4)) for at in named[:MOST_WORDS]]


def _samples(found: Audit, distinct: NDArray[np.bool_], seed: int) -> Iterator[tuple[int, int, _Array, _Array]]:
    """Prompt, factor, rising positions (n,) and groups (n,) of the images that CLIP is shown, by factor and prompt."""
    for factor, weights in zip(range(len(found.factors)), found.group_weights, strict=False):
        for prompt in sorted(split.prompt for split in found.factors[factor].splits):
            rows = np.flatnonzero(found.kept & distinct & (found.prompt_ids == prompt) & known_rows(weights))
            labels = weights[rows].argmax(axis=1)
            rng = np.random.default_rng(derived_seed("sample of words", seed, prompt, factor))
            of_groups = [rng.permutation(np.flatnonzero(labels == group)) for group in np.unique(labels)]
            taken = np.sort(np.concatenate([members[:IMAGES_PER_GROUP] for members in of_groups]))
            yield prompt, factor, rows[taken], labels[taken]


def vocabulary(captions: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """The words that CLIP chooses from, each once: the user's `further` ones, the captions' commonest, common ones."""
    letters, limits = r"(?u)\b[^\W\d_]{3,30}\b", {"min_df": LEAST_CAPTIONS, "max_features": MOST_CAPTION_WORDS}
    of_captions = CountVectorizer(token_pattern=letters, stop_words=STOP_WORDS, binary=True, **limits)
    words = [one_line(word, WORD_LIMIT) for word in further]
    with suppress(ValueError):  # no word of the captions is left
        words += of_captions.fit(captions).get_feature_names_out().tolist()
    words += [line.strip() for line in COMMON_WORDS.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    distinct: dict[str, str] = {}
    for word in filter(None, words):
        distinct.setdefault(word.casefold(), word)
    return list(distinct.values())


def stem(word: str) -> str:
    """A word without its plural's s, lower case."""
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
