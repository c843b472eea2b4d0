"""The released checkpoint's captions must not change with the code or the libraries."""

import pytest
from golden import ROOT, golden_images, make_captions, read_golden_captions
from transformers import pipeline


@pytest.mark.slow  # `test_versions.py` compares them with processor and `generate`.
def test_the_released_checkpoint_says_what_it_always_said():
    captions = make_captions(pipeline("image-to-text", model=str(ROOT), trust_remote_code=True))
    assert captions == read_golden_captions()


def test_no_golden_image_carries_a_color_profile():
    assert len(golden_images()) == 20
    assert not any("icc_profile" in image.info for image in golden_images().values())
