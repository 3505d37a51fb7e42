"""What a registered adapter is when it is served: images and prompts in, masks out. MLflow copies this file.

It is run as it is, by ``mlflow models serve`` or ``mlflow.pyfunc.load_model``, wherever wesam is installed; nothing is
unpickled. The weights of the SAM are not part of it: they are found by the name that the adapter says, and refused if
they are not the very ones that it was made for.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from pycocotools import mask as rle
from pydantic import BaseModel, ConfigDict, Field

from wesam import AdaptedSam, InputError, Prompts, load_sam, predict
from wesam.adapters import made_for
from wesam.data.images import read_image

AT_ONCE = 2**30
"""Bytes of masks that are held at once: for more of them a large image is encoded more than once."""


class Given(BaseModel):
    """An image and the prompts of the objects in it, all of one kind, in pixels from its upper left corner."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="a PNG, JPEG or other image file, in base64")
    boxes: list[list[float]] | None = Field(None, description="an object each: x0, y0, x1, y1")
    tight: bool | None = Field(None, description="whether each box holds all of its object: masks are then cut to it")
    points: list[list[list[float]]] | None = Field(None, description="clicks of an object each: x, y")
    labels: list[list[int]] | None = Field(None, description="of the clicks: 1 on the object (default), 0 beside it")
    polygons: list[list[list[float]]] | None = Field(None, description="rough outlines, of an object each: x, y")


class Mask(BaseModel):
    """The mask of an object."""

    size: list[int] = Field(description="height and width of the image")
    counts: str = Field(description="COCO's compressed RLE, as pycocotools.mask.decode reads it together with size")
    predicted_iou: float = Field(description="how right the model thinks the mask is, 0 to 1")


class Refused(MlflowException):
    """What is wrong with a request, in a line: MLflow's server would put the request before it, images and all."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "message" or not hasattr(self, name):
            super().__setattr__(name, value)


class Segmenter(PythonModel):
    """The model: for each image the masks of its prompts, in their order."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the SAM and puts the adapter on it; ``model_config`` may name another file of weights, and a device."""
        options = context.model_config or {}
        adapter = Path(context.artifacts["adapter"])
        device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        sam = load_sam(options.get("model") or made_for(adapter)).to(device)
        self.model = AdaptedSam.load(sam, adapter)

    def predict(
        self, context: PythonModelContext, model_input: list[Given], params: dict[str, Any] | None = None
    ) -> list[list[Mask]]:
        """The masks for each image's prompts; raises MlflowException for a wrong input, which over HTTP answers 400."""
        try:
            return [self._masks(given, f"image {n}") for n, given in enumerate(model_input)]
        except InputError as e:
            raise Refused.invalid_parameter_value(str(e)) from None

    def _masks(self, given: Given, name: str) -> list[Mask]:
        try:
            content = base64.b64decode(given.image, validate=True)
        except ValueError as e:  # binascii.Error too
            raise InputError(f"{name} is not in base64: {e}") from None
        image = torch.from_numpy(read_image(Path(name), content=content).copy()).permute(2, 0, 1)
        prompts = read_prompts(given, name)
        if prompts is None:
            return []
        try:
            prompts.check_on((image.shape[1], image.shape[2]))
        except InputError as e:
            raise InputError(f"{name}: {e}") from None
        found = []
        for part in torch.arange(len(prompts)).split(max(1, AT_ONCE // image[0].numel())):
            masks, iou = predict(self.model, image, prompts[part])
            found += [_packed(m.numpy(), float(i)) for m, i in zip(masks, iou, strict=True)]
        return found


def read_prompts(given: Given, name: str) -> Prompts | None:
    """The prompts of an image, None for an empty list; raises InputError, which calls the image by this name, for what
    is no box, click or polygon.
    """
    if sum(x is not None for x in (given.boxes, given.points, given.polygons)) != 1:
        raise InputError(f"{name} needs boxes, points or polygons, and of these only one")
    if given.labels is not None and given.points is None:
        raise InputError(f"{name}: labels are those of points")
    if given.tight and given.boxes is None:
        raise InputError(f"{name}: tight is said of boxes")
    if given.polygons is not None:
        for polygon in given.polygons:
            if len({tuple(corner) for corner in polygon}) < 3 or not _places(polygon):
                raise InputError(f"{name}: expected a polygon [[x, y], ...] with 3 corners or more, got {polygon}")
        outlines = tuple(torch.tensor(p, dtype=torch.float32) for p in given.polygons)
        return Prompts(polygons=outlines) if outlines else None
    if given.boxes is not None:
        for box in given.boxes:
            if len(box) != 4 or not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
                raise InputError(f"{name}: expected a box x0, y0, x1, y1 with x1 above x0 and y1 above y0, got {box}")
        boxes = torch.tensor(given.boxes, dtype=torch.float32)
        return Prompts(boxes=boxes, tight=bool(given.tight)) if given.boxes else None
    points = given.points or []
    labels = [[1] * len(p) for p in points] if given.labels is None else given.labels
    if [len(p) for p in points] != [len(n) for n in labels]:
        raise InputError(f"{name}: labels must have a number for every click of points")
    objects = []
    for clicks, marks in zip(points, labels, strict=True):
        if not _places(clicks):
            raise InputError(f"{name}: expected clicks [[x, y], ...], got {clicks}")
        if not set(marks) <= {0, 1} or 1 not in marks:
            raise InputError(f"{name}: clicks are labelled 1 (on the object) or 0 (beside it), at least one with 1")
        xy, on = torch.tensor([clicks], dtype=torch.float32), torch.tensor([marks], dtype=torch.int)
        objects.append(Prompts(points=xy, point_labels=on))
    return Prompts.concatenate(objects) if objects else None


def _places(given: list[list[float]]) -> bool:
    return all(len(place) == 2 and np.isfinite(place).all() for place in given)


def _packed(mask: np.ndarray, iou: float) -> Mask:
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return Mask(size=list(code["size"]), counts=code["counts"].decode(), predicted_iou=iou)


set_model(Segmenter())
