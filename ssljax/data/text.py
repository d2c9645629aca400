"""Texts of examples as token ids: captions that a source has, or sentences about its classes."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssljax.data import order
from ssljax.data.sources import Source

PAD, START, END = 0, 1, 2
SPECIAL = ("<pad>", "<start>", "<end>")
# Texts that a vocabulary is learnt from, at most; more change rare words alone.
SAMPLE = 100_000
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Captions:
  """Texts as ids. Build it with `captions`; `using` gives it the vocabulary."""

  length: int
  vocabulary: int
  names: tuple[str, ...]
  templates: tuple[str, ...]
  tokenizer: Any = None

  def check(self, source: Source) -> None:
    """Raises ValueError where the source has neither captions nor labels with names."""
    if source.captions is not None:
      source.captions(np.arange(1))
      return
    if not self.names:
      raise ValueError(
        f"{source.name} has no texts: tar shards hold them as .txt or .json members beside the"
        " images, npz files under the key text, and data.text.names=('cat', 'dog', …) makes them"
        " from labels"
      )
    if not source.labelled:
      raise ValueError(f"data.text.names names classes, but {source.name} has no labels")
    if source.labels is not None:
      self._check_labels(source, source.labels)

  def _check_labels(self, source: Source, labels: np.ndarray) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.names):
      raise ValueError(
        f"{source.name} has labels from {labels.min()} to {labels.max()}, but data.text.names"
        f" holds {len(self.names)} names"
      )

  def texts(
    self, source: Source, seed: int, epoch: Any, index: np.ndarray, labels: np.ndarray | None
  ) -> list[str]:
    """One text of each example, a function of (seed, epoch, index): one of its captions, or one of
    the templates about its class.

    Raises:
      ValueError: a text is blank; names the example.
    """
    index = np.asarray(index)
    if source.captions is not None:
      several = source.captions(index)
    else:
      labels = np.asarray(labels)
      self._check_labels(source, labels)
      several = [self._about(self.names[int(label)]) for label in labels]
    keys = order.keys(seed, epoch, index, "text")
    found = [own[_choose(key, len(own))] for own, key in zip(several, keys)]
    for text, i in zip(found, index):
      if not text.strip():
        raise ValueError(f"the text of {source.example_name(int(i))} is empty")
    return found

  def _about(self, name: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", name) for template in self.templates)

  def draw(
    self, source: Source, seed: int, epoch: Any, index: np.ndarray, labels: np.ndarray | None
  ) -> np.ndarray:
    """Ids of `texts`: int32 [k l]."""
    return self.encode(self.texts(source, seed, epoch, index, labels))

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Start, the text's ids, end, padding; a text that is too long is cut before its end token:
    -> int32 [k l]."""
    out = np.full((len(texts), self.length), PAD, np.int32)
    for row, found in zip(out, self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
      ids = [START, *found.ids[: self.length - 2], END]
      row[: len(ids)] = ids
    return out

  def prompts(self) -> np.ndarray:
    """Every template about every class: int32 [c t l]."""
    made = [text for name in self.names for text in self._about(name)]
    return self.encode(made).reshape(len(self.names), len(self.templates), self.length)

  def vocabulary_of(self, source: Source, folder: pathlib.Path | None) -> str:
    """`learn`, once: tokenizer.json of the folder, where it was learnt from these texts."""
    if folder is None:
      return self.learn(source)
    kept, about = folder / "tokenizer.json", folder / "tokenizer_about.json"
    now = json.dumps({"text": repr(self), "source": source.fingerprint}, sort_keys=True)
    # A dry run, or a run that failed at once, may have left one of other texts.
    if kept.exists() and about.exists() and about.read_text() == now:
      return kept.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)
    learnt = self.learn(source)
    kept.write_text(learnt)
    about.write_text(now)  # last: it vouches for the other
    return learnt

  def learn(self, source: Source) -> str:
    """A vocabulary of byte pairs learnt from the source's texts, as the tokenizers library writes
    it (JSON)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    space = normalizers.Replace(Regex(r"\s+"), " ")
    steps = [normalizers.NFC(), normalizers.Lowercase(), space, normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=self.vocabulary, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(self._sample(source), trainer)
    return tokenizer.to_str()

  def _sample(self, source: Source):
    if source.captions is None:
      for name in self.names:
        yield from self._about(name)
      return
    index = np.unique(np.linspace(0, source.size - 1, min(source.size, SAMPLE)).astype(np.int64))
    for start in range(0, len(index), CHUNK):
      for own in source.captions(index[start : start + CHUNK]):
        yield from own

  def using(self, stored: str) -> "Captions":
    """The same with a vocabulary that `learn` made."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(stored)
    tokenizer.encode_special_tokens = True  # "<end>" in a caption is six letters
    if tokenizer.get_vocab_size() > self.vocabulary:
      raise ValueError(
        f"the vocabulary holds {tokenizer.get_vocab_size()} tokens, data.text.vocabulary is"
        f" {self.vocabulary}"
      )
    return dataclasses.replace(self, tokenizer=tokenizer)


def captions(
  *,
  length: int = 32,
  vocabulary: int = 8192,
  names: tuple[str, ...] = (),
  templates: tuple[str, ...] = ("a photo of a {}.",),
) -> Captions:
  """Texts beside images, the leaf `text` [b l] of ids: 0 is padding, 1 starts a text, 2 ends it.

  Args:
    length: ids of a text, start and end included; longer texts are cut.
    vocabulary: number of ids; byte pairs are learnt once, from the source, and kept in the workdir.
    names: of the classes, in the order of the labels. They make texts where the source has none,
      and are what a zero-shot evaluation chooses from.
    templates: sentences about a class, whose name takes the place of {}.

  Raises:
    ValueError: a length or vocabulary that cannot hold a text, a template without {}, a name
      that is blank or there twice.
  """
  if length < 3:
    raise ValueError(f"data.text.length {length}: start, end and one token between need 3")
  if vocabulary < len(SPECIAL) + 256:
    raise ValueError(f"data.text.vocabulary {vocabulary}: the 256 bytes and 3 special ids need 259")
  if not templates:
    raise ValueError("data.text.templates is empty: one sentence is needed, 'a photo of a {}.'")
  for template in templates:
    if "{}" not in template:
      raise ValueError(f"data.text.templates: {template!r} has no {{}} for the name of the class")
  if not all(name.strip() for name in names) or len(set(names)) < len(names):
    raise ValueError("data.text.names holds a name that is blank or there twice")
  return Captions(length, vocabulary, tuple(names), tuple(templates))


def caption_of(record: bytes, is_json: bool, name: str) -> tuple[str, ...]:
  """The texts in a .txt or .json member, in the latter under "caption" or "text".

  Raises:
    ValueError: it cannot be read; names the example.
  """
  try:
    text = record.decode("utf-8")
    if not is_json:
      return (text,)
    told = json.loads(text)
    found = told.get("caption", told.get("text"))
  except (ValueError, AttributeError) as error:
    raise ValueError(f"the text of {name} cannot be read ({error})") from None
  found = [found] if isinstance(found, str) else found
  if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
    raise ValueError(f"the text of {name} holds no caption: it has {', '.join(told)}")
  return tuple(found)


def _choose(key: np.ndarray, count: int) -> int:
  """A number below `count`, a function of the example's key."""
  return int(np.random.Generator(np.random.Philox(key=key)).integers(count)) if count > 1 else 0
