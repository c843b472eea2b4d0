"""The image processor of a TinyCap repository in Pillow and numpy, bit for bit.

It equals `CLIPImageProcessor` on Pillow (transformers' choice if torchvision isn't installed).
"""

import numpy as np
from PIL import Image


# Supported values of settings; then the settings of which every value is supported.
NEUTRAL = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    **{"do_pad": (False, None), "do_convert_rgb": (True, None)},
}
ANY_VALUE = {
    *("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", "image_processor_type"),
    *("processor_class", "data_format", "return_tensors", "default_to_square"),
}


class ImagePreprocessor:
    """RGB images -> pixel values, by the content of a `preprocessor_config.json`.

    Raises `ValueError` where a setting isn't supported; names it.
    """

    DEFAULTS = {"size": {"shortest_edge": 224}, "crop_size": 224, "rescale_factor": 1 / 255}

    def __init__(self, config: dict):
        config = {**self.DEFAULTS, **config}
        kind = config.get("image_processor_type", "CLIPImageProcessor")
        if kind.removesuffix("Fast").removesuffix("Pil") != "CLIPImageProcessor":
            raise ValueError(f"image_processor_type: expected CLIPImageProcessor, got {kind}")
        for name, value in config.items():
            if value not in NEUTRAL.get(name, (value,)):
                raise ValueError(f"preprocessor config: expected {name} {NEUTRAL[name][0]}, got {value}")
            if name not in ANY_VALUE and name not in NEUTRAL and value is not None:
                raise ValueError(f"preprocessor config: {name}={value} isn't supported without transformers")
        size, crop = config["size"], config["crop_size"]
        self.shortest_edge = size.get("shortest_edge") if isinstance(size, dict) else size
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        self.crop_height, self.crop_width = crop["height"], crop["width"]
        if self.shortest_edge is None or max(self.crop_height, self.crop_width) > self.shortest_edge:
            raise ValueError(
                "preprocessor config: expected a shortest_edge that is no shorter than the crop "
                f"{self.crop_height}x{self.crop_width}, got size {size}"
            )
        resample = config.get("resample")
        self.resample = Image.Resampling.BICUBIC if resample is None else Image.Resampling(resample)
        # A lookup table of the 256 values of each channel, computed in the processor's types.
        scaled = (np.arange(256, dtype=np.float64) * config["rescale_factor"]).astype(np.float32)
        means, stds = (np.broadcast_to(np.float32(config[name]), 3) for name in ("image_mean", "image_std"))
        self.values = [(scaled - mean) / std for mean, std in zip(means, stds)]

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """RGB images of any sizes -> (B, 3, crop height, crop width), float32."""
        pixel_values = np.empty((len(images), len(self.values), self.crop_height, self.crop_width), np.float32)
        for image, target in zip(images, pixel_values):
            pixels = np.asarray(self._resize_and_crop(image))
            for channel, values in enumerate(self.values):
                np.take(values, pixels[..., channel], out=target[channel])
        return pixel_values

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        size = tuple(int(self.shortest_edge * side / min(image.size)) for side in image.size)
        left, top = (size[0] - self.crop_width) // 2, (size[1] - self.crop_height) // 2
        image = image.resize(size, self.resample)
        return image.crop((left, top, left + self.crop_width, top + self.crop_height))
