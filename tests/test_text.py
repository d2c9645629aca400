"""Texts beside images: where they come from, ids, the vocabulary that is kept, errors in words."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from PIL import Image

from ssljax.data.pipeline import batches, examples
from ssljax.data.sources import open_source
from ssljax.data.text import END, PAD, START, captions

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = dict(length=12, vocabulary=300)


def picture(value):
  out = io.BytesIO()
  Image.new("RGB", (8, 8), (value, 0, 0)).save(out, "PNG")
  return out.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w") as shard:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      shard.addfile(info, io.BytesIO(data))
  return f"tar:{path}"


def ready(source, **arguments):
  text = captions(**SMALL | arguments)
  text.check(source)
  return text.using(text.learn(source))


def decoded(text, ids):
  return [text.tokenizer.decode(row.tolist()) for row in ids]


def test_ids_start_end_padding_and_the_cut():
  text = ready(open_source("digits", channels=1), names=NAMES)
  short, long = text.encode(["a photo of a Two.", "two " * 50])
  assert short[0] == long[0] == START and long[-1] == END and (long[1:-1] > END).all()
  end = int(np.flatnonzero(short == END)[0])
  assert (short[end + 1 :] == PAD).all() and short.dtype == np.int32
  # Lower case, one space for many, none at the ends; what is in a caption is no special token.
  np.testing.assert_array_equal(text.encode(["  a photo\n of a  two. "])[0], short)
  assert (text.encode(["<end>"])[0] == END).sum() == 1
  assert decoded(text, text.encode(["séven ☃"])) == ["séven ☃"]


def test_sentences_about_classes_are_a_function_of_seed_epoch_and_index():
  source = open_source("digits", channels=1)
  text = ready(source, names=NAMES, templates=("a photo of a {}.", "the {}", "{}!"))
  index = np.arange(200)
  found = text.texts(source, 0, 0, index, source.labels[:200])
  for told, label in zip(found, source.labels):
    assert NAMES[label] in told
  assert {told.replace(NAMES[c], "{}") for told, c in zip(found, source.labels)} == set(
    text.templates
  )
  part = text.texts(source, 0, np.zeros(3), index[[5, 9, 2]], source.labels[[5, 9, 2]])
  assert part == [found[5], found[9], found[2]]
  assert found != text.texts(source, 0, 1, index, source.labels[:200])
  assert found != text.texts(source, 1, 0, index, source.labels[:200])
  assert text.prompts().shape == (10, 3, 12)
  assert decoded(text, text.prompts()[4]) == ["a photo of a four.", "the four", "four!"]


def test_batches_carry_the_text_of_their_images_from_any_step():
  source = open_source("digits", channels=1)
  text = ready(source, names=NAMES)
  given = dict(batch_size=8, seed=3, text=text)
  with batches(source, steps=3, **given) as stream:
    whole = list(stream)
  for batch in whole:
    assert batch["text"].shape == (8, 12) and batch["text"].dtype == np.int32
    assert decoded(text, batch["text"]) == [f"a photo of a {NAMES[c]}." for c in batch["label"]]
  with batches(source, start_step=2, rows=[1, 6], **given) as stream:
    np.testing.assert_array_equal(next(stream)["text"], whole[2]["text"][[1, 6]])
  with examples(source, batch_size=5, indices=[7, 2], text=text) as stream:
    batch = next(stream)
  assert decoded(text, batch["text"])[:2] == [
    f"a photo of a {NAMES[c]}." for c in source.labels[[7, 2]]
  ]


def test_tar_members_are_captions(tmp_path):
  members = {}
  for i in range(6):
    members[f"{i}.png"] = picture(40 * i)
    told = {"caption": [f"red {i}", f"shade {i}"], "url": "x"} if i % 2 else None
    members[f"{i}.json"] = json.dumps(told or {"url": "x"}).encode()
    if not i % 2:
      members[f"{i}.txt"] = f"colour {i}\n".encode()
  source = open_source(write_tar(tmp_path / "a.tar", members), cache_dir=str(tmp_path / "c"))
  assert source.captions([4, 1]) == [("colour 4\n",), ("red 1", "shade 1")]
  again = open_source(f"tar:{tmp_path}/a.tar", "train[2:]", cache_dir=str(tmp_path / "c"))
  assert again.captions([2, 1]) == [("colour 4\n",), ("red 3", "shade 3")]
  text = ready(source)
  with batches(source, batch_size=6, text=text, steps=8) as stream:
    seen = {(int(i), t) for b in stream for i, t in zip(b["index"], decoded(text, b["text"]))}
  several = {(i, f"{word} {i}") for i in (1, 3, 5) for word in ("red", "shade")}
  assert seen == several | {(i, f"colour {i}") for i in (0, 2, 4)}
  source.close()


def test_arrays_and_npz_with_texts(tmp_path):
  image = np.zeros((3, 4, 4, 3), np.uint8)
  arrays = dict(image=image, text=np.array(["a", "bc", "d"]))
  np.savez(tmp_path / "x.npz", image=image, said=arrays["text"])
  for source in (open_source(arrays), open_source(f"npz:{tmp_path}/x.npz?text=said")):
    assert source.captions([2, 1]) == [("d",), ("bc",)]
  other = open_source(dict(arrays, text=["a", "bc", "e"])).fingerprint
  assert other != open_source(arrays).fingerprint
  assert "texts" not in open_source(dict(image=image)).fingerprint
  with pytest.raises(ValueError, match="one string for each of the 3 images"):
    open_source(dict(image=image, text=["a", "b"]))


def test_vocabulary_is_learnt_once_and_again_for_other_texts(tmp_path, monkeypatch):
  source = open_source("digits", channels=1)
  text = captions(**SMALL, names=NAMES)
  first = text.vocabulary_of(source, tmp_path)
  assert first == text.learn(source)  # the same every time
  kept = (tmp_path / "tokenizer.json").stat().st_mtime_ns
  assert text.vocabulary_of(source, tmp_path) == first
  assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == kept
  other = captions(**SMALL, names=NAMES[::-1][:9] + ("dozen",))
  assert other.vocabulary_of(source, tmp_path) != first
  with pytest.raises(ValueError, match="tokens, data.text.vocabulary is 260"):
    captions(length=12, vocabulary=260).using(first)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(length=2), "data.text.length 2"),
    (dict(vocabulary=100), "data.text.vocabulary 100: .* need 259"),
    (dict(templates=()), "data.text.templates is empty"),
    (dict(templates=("a photo",)), "'a photo' has no {} for the name"),
    (dict(names=("a", "a")), "blank or there twice"),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    captions(**SMALL | arguments)


def test_what_is_missing_is_named(tmp_path):
  digits = open_source("digits", channels=1)
  with pytest.raises(ValueError, match="digits has no texts: tar shards hold them as .txt"):
    captions().check(digits)
  with pytest.raises(ValueError, match="labels from 0 to 9, but data.text.names holds 3 names"):
    captions(names=NAMES[:3]).check(digits)
  image = np.zeros((2, 4, 4, 3), np.uint8)
  with pytest.raises(ValueError, match="but arrays in memory has no labels"):
    captions(names=NAMES).check(open_source(dict(image=image)))
  blank = open_source(dict(image=image, text=["a", " "]))
  text = ready(blank)
  with pytest.raises(ValueError, match=r"the text of arrays in memory\[1\] is empty"):
    text.draw(blank, 0, 0, np.arange(2), None)

  def tar(**members):
    members = {name.replace("_", "."): data for name, data in members.items()}
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar"
    return open_source(write_tar(path, members), cache_dir=str(tmp_path / "c"))

  with pytest.raises(ValueError, match=r"1 of 2 images have no .txt or .json member.*/k2.png"):
    captions().check(tar(k1_png=picture(1), k1_txt=b"x", k2_png=picture(2), k2_txt=b""))
  with pytest.raises(ValueError, match="the text of .*k.png holds no caption: it has url"):
    captions().check(tar(k_png=picture(1), k_json=b'{"url": "x"}'))
  with pytest.raises(ValueError, match="the text of .*k.png cannot be read"):
    captions().check(tar(k_png=picture(1), k_txt=b"\xff\xfe"))


def test_images_alone_do_not_need_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with batches(open_source("digits", channels=1), batch_size=4) as stream:
    assert "text" not in next(stream)
